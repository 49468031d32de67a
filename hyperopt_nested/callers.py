"""Where a user's code called the library, for warnings to point to."""

import os
import sys
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, str(torch.__file__)))


def caller_level() -> int:
    """Return the `stacklevel` for a warning of the calling function: the first frame outside of the library and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
