"""Lean training, see docs/lean_training.md.

`recipes.py` is what the operators call; `models.py` sets the level of a model; `counts.py` counts the bytes of each
level, for ``memory_report`` (`report.py`) and ``fit_memory`` (`fit.py`).
"""

from .recipes import LEVELS, Kind, concatenated, makes_again, offer, saving

__all__ = ["LEVELS", "Kind", "concatenated", "makes_again", "offer", "saving"]
