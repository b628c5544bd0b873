"""One file per op family or model. The registry imports every module here, and each registers its cases.

Torch is imported only inside functions, because ``list`` must work without it.
"""
