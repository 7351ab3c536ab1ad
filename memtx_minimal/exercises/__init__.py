"""Checks for the exercises: exercises.check("1.2", my_shift).

They say "right", "not answered yet", or which case fails, what was expected and what
came. One file a chapter holds what is right; `core` asks, compares and words.
"""

import importlib
import pkgutil

from memtx_minimal.exercises.core import EXERCISES, TAUGHT, NotRight, check, require

__all__ = ["EXERCISES", "TAUGHT", "NotRight", "check", "require"]

for file in pkgutil.iter_modules(__path__):  # a chapter joins by its file
    importlib.import_module(f"{__name__}.{file.name}")
