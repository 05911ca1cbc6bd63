"""Published data sets, in the layouts in which they are published -> records of one type.

One data set a file; `layout` holds what they share. docs/data.md says where each is obtained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError
from . import folder, psc6k, quickdraw, shoes, sketchy, tuberlin, voc
from .folder import find_images
from .layout import Among, class_names, letters
from .records import DataError, DataSet, Record
from .splits import limited, spaced, split

LOADERS = {
    "sketchy": sketchy,
    "tuberlin": tuberlin,
    "quickdraw": quickdraw,
    "psc6k": psc6k,
    "folder": folder,
    "voc": voc,
    "shoes": shoes,
}
NAMES = tuple(LOADERS)
__all__ = [
    "NAMES", "DataError", "DataSet", "Record", "class_names", "find_images", "limited", "load", "load_common",
    "spaced", "split",
]  # fmt: skip


def load(
    name: str,
    root: str | os.PathLike,
    *,
    classes: str | os.PathLike | Sequence[str] = "all",
    part: str | None = None,
) -> DataSet:
    """The records of a data set that lies in a folder. Only names are read; images are opened by `Record.open`.

    (Shoes are the exception: where their key points lie shows only in the pixels, so all 800 are looked at.)

    Args:
        name: which set, of `NAMES`.
        root: its folder, as its archive unpacks; `~` is not expanded.
        classes: `"all"`; `"seen"` or `"unseen"` of the split that the papers use, and the other lists that ship with
            the package, such as `"unseen-25"`, of which those present are taken; or a file with one name a line, or
            names, all of which have to be there.
        part: `"train"`, `"valid"` or `"test"`, where the set is published in parts; None takes all.

    Raises:
        DataError: the folder is not that set, is incomplete, or a class is not in it.
        ConfigError: no such set, or no such part of it.
        ImageError: an image of shoes cannot be read.
    """
    if name not in LOADERS:
        near = get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError("data", f"no data set is called {name!r}{hint}", legal=", ".join(NAMES))
    loader = LOADERS[name]
    published = loader.PUBLISHED
    if part is not None and part not in published.parts:
        legal = ", ".join(published.parts) or "none: it is published in one part"
        raise ConfigError("part", f"{published.title} has no part {part!r}", legal=legal)
    try:
        return loader.scan(Path(root), classes, part)
    except OSError as error:
        raise published.error(Path(root), f"cannot be read: {error}") from None


def load_common(name: str, root: str | os.PathLike, classes: Sequence[str]) -> DataSet:
    """The classes of a set that another set has too, under the names that they have there.

    Names are compared by their letters: Sketchy's `hot-air_balloon` is TU-Berlin's `hot air balloon`.

    Args:
        name, root: as for `load`.
        classes: the other set's.

    Raises:
        DataError: as `load`; also where there is no such class.
        ConfigError, ImageError: as `load`.
    """
    found = load(name, root, classes=Among(classes))
    spelled = {letters(label): label for label in classes}
    records = (replace(record, label=spelled[letters(str(record.label))]) for record in found.records)
    labels = sorted({spelled[letters(label)] for label in found.classes})
    return replace(found, classes=tuple(labels), records=tuple(sorted(records, key=lambda record: str(record.label))))
