"""Triton kernels and their launchers. They are imported at their first use, as ``import advdl_ops`` needs no Triton."""
