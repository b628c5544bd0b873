"""Code that several test modules use: problems, fp64 truth, the rule for comparing values."""
