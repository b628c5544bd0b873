"""Kernels in Triton and their launchers, imported where one is about to run: ``import advdl_ops`` imports no Triton."""
