"""CUDA kernels on the host: builds the emulation, runs it in a process of its own, hands back bytes.

    from cuda_emulation import Emulator, unavailable

See README.md for what is emulated and how faults are reported.
"""

from .build import unavailable
from .client import EmulationError, Emulator, LstmBinding

__all__ = ["EmulationError", "Emulator", "LstmBinding", "unavailable"]
