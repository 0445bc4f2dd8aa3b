"""Machine code, ready to be called."""

from __future__ import annotations

import ctypes

_StageFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
