"""Triton kernels, one operation a file, each beside the torch code it must equal.

They run on CUDA where Triton is there; elsewhere, and in float64, the torch code does. What this process has is found
out here, once; a tensor's device and dtype say the rest.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

# Triton's interpreter runs the kernels on the CPU, far too slowly for anything but their tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _found() -> bool:
    """Whether Triton is there, and on CUDA what it builds its launcher from: a C compiler and Python's headers."""
    if find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # Debian's own Python names another place first, where pip installs and no headers are.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return INTERPRETED or (torch.version.cuda is not None and compiler is not None and headers.is_file())


TRITON = _found()


def usable(x: Tensor) -> bool:
    """Whether the kernels take `x`: in a dtype they know, on a GPU that Triton supports (Ampere or later)."""
    if not TRITON or x.dtype not in DTYPES:
        return False
    if INTERPRETED:
        return x.device.type == "cpu"
    return x.is_cuda and torch.cuda.get_device_properties(x.device).major >= 8
