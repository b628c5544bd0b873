"""One file per op family or model; every module here is imported by the registry and registers its cases.

Torch is imported inside the functions only: ``list`` must not need it.
"""
