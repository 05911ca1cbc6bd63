"""Folders, and files of tensors that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import SketchFusionError


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside its place first, then put it there, over what was there.

    Raises:
        SketchFusionError: naming the file, which is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        readers = unfinished.stat().st_mode  # as the user's umask has it; save_file leaves it to the owner alone
        save_file(dict(tensors), unfinished, metadata)
        unfinished.chmod(readers)
        os.replace(unfinished, path)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a null byte in the path
        raise SketchFusionError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError, ValueError):
            unfinished.unlink()


def share(folder: Path, like: Path) -> None:
    """Give every file of a folder the mode of another file: save_file leaves what it writes to its owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(like.stat().st_mode)


def make_folder(path: Path) -> None:
    """With its parents, where it is missing.

    Raises:
        SketchFusionError: a file is in the way, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SketchFusionError(f"the folder {path} cannot be made: {error.strerror or error}") from None
