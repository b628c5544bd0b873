"""Every 2-D convolution: what it is (problem), who serves it (choice), and what serves (cpu, cuda, folded).

``functional/`` and ``nn/`` call :mod:`.operators` and :mod:`.folded`; nothing here knows of modules or of autograd.
"""
