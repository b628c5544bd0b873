"""What several test modules use: problems, fp64 truth, the rule by which values are judged."""
