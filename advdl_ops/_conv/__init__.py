"""Every 2-D convolution: its description (problem), the choice of a candidate (choice), the candidates (cpu, cuda,
folded).

``functional/`` and ``nn/`` call :mod:`.operators` and :mod:`.folded`. Nothing here depends on modules or autograd.
"""
