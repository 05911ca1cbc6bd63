"""Folders, and files of tensors that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A folder to write into: what is there at the end takes its place in `directory`, file by file.

    A folder inside it is a whole model: weights that lie under other names where it goes are deleted, for of a model in
    one file and an index of several the index would be read.

    Raises:
        SketchFusionError: it cannot be written to. Until everything was written, nothing of it has changed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as folder:
            stage = Path(folder)
            yield stage
            written = [path for path in sorted(stage.rglob("*")) if path.is_file()]
            (stage / "readers").touch()
            readers = (stage / "readers").stat().st_mode  # save_file leaves what it writes to its owner alone
            models = {path.parent.relative_to(stage) for path in written if path.suffix == ".safetensors"} - {Path()}
            for old in (old for model in models for old in (directory / model).glob("*.safetensors*")):
                if not (stage / old.relative_to(directory)).exists():
                    old.unlink()
            for path in written:
                target = directory / path.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.chmod(readers)
                os.replace(path, target)
    except (OSError, SafetensorError) as error:
        raise SketchFusionError(
            f"{directory} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def make_folder(path: Path) -> None:
    """With its parents, where it is missing.

    Raises:
        SketchFusionError: a file is in the way, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SketchFusionError(f"the folder {path} cannot be made: {error.strerror or error}") from None
