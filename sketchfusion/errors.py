"""The errors that come out for bad input: one base class, one subclass for each thing a user can mend."""

from functools import partial


class SketchFusionError(Exception):
    """Base of every error that this package raises for bad input."""


class ImageError(SketchFusionError):
    """An image could not be read, or is not what `encode` takes.

    Attributes:
        index: position of the image in the list or iterator it came from; None for a single image.
        source: the path or URL, or the type of the object, that was refused.
    """

    def __init__(self, problem: str, *, source: str | None = None, index: int | None = None):
        self.problem, self.source, self.index = problem, source, index
        where = f"image {index}" if index is not None else "image"
        super().__init__(f"{where} ({source}): {problem}" if source else f"{where}: {problem}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross the borders of process pools, and keyword-only arguments do not by default.
        return partial(ImageError, source=self.source, index=self.index), (self.problem,)


class ConfigError(SketchFusionError):
    """A configuration key is unknown, missing, of the wrong type, or does not fit the model.

    Attributes:
        key: the key's dotted path in `config.json`, for example `semantic.image_size`.
        legal: the legal values, in words.
    """

    def __init__(self, key: str, problem: str, *, legal: str):
        self.key, self.problem, self.legal = key, problem, legal
        super().__init__(f"{key}: {problem}; legal: {legal}")

    def __reduce__(self) -> tuple[object, ...]:
        return partial(ConfigError, legal=self.legal), (self.key, self.problem)


class LoadError(SketchFusionError):
    """A checkpoint or backbone could not be loaded; the message names the repository or file, and what to do."""
