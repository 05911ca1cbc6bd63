"""Evaluation: five protocols, the rows that they compare, the report, and the analysis of the features."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from ..data import limited, load, load_common
from ..errors import ConfigError
from ..loading import PathLike
from ..model import SketchFusion
from .protocols import Result, correspondence, fg_sbir, recognition, segmentation, zs_sbir
from .rows import ROWS, Extractor

PROTOCOLS = {
    "zs-sbir": zs_sbir,
    "fg-sbir": fg_sbir,
    "recognition": recognition,
    "correspondence": correspondence,
    "segmentation": segmentation,
}
__all__ = ["PROTOCOLS", "ROWS", "Extractor", "Result", "evaluate"]


def evaluate(
    task: str,
    data: str,
    root: PathLike,
    *,
    model: SketchFusion | PathLike = "mini",
    classes: str | os.PathLike | Sequence[str] = "all",
    part: str | None = None,
    rows: Sequence[str] = tuple(ROWS),
    limit: int | None = None,
    batch_size: int | None = None,
    ensemble: int | None = None,
    size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool | None = None,
    **settings: Any,
) -> list[Result]:
    """Load a data set and a model, and run a protocol: `sketchfusion evaluate` in Python.

    Args:
        task: one of `PROTOCOLS`.
        data, root, classes, part: as for `sketchfusion.data.load`. Recognition on the `"valid"` or `"test"` part fits
            to the `"train"` part.
        model: a model, or what `SketchFusion.from_pretrained` takes, with `device` and `dtype`.
        rows, batch_size, ensemble, size, progress: as for `Extractor`.
        limit: take at most so many sketches and photos of each class.
        **settings: of the protocol: `convention`, `gallery`, `held_out`, `queries`; `photos` and `sketches`, each the
            name and the root of another set, of which the classes that both have are taken; `test`, another root of
            the same set. None leaves the default.

    Returns:
        A result for each row; correspondence and segmentation add rows without features, and of another class.

    Raises:
        ConfigError: an argument is unknown, illegal or of another protocol.
        DataError: the data is not there, or not what the protocol needs.
        LoadError: the model or an encoder cannot be loaded.
        ImageError: an image cannot be read; its source is the file.
    """
    if task not in PROTOCOLS:
        raise ConfigError("task", f"there is no protocol {task!r}", legal=", ".join(PROTOCOLS))
    protocol: Any = PROTOCOLS[task]
    legal = [name for name in inspect.signature(protocol).parameters if name not in ("extractor", "data")]
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings:
        if name not in legal:
            raise ConfigError(name, f"is no setting of {task}", legal=", ".join(legal) or "none")
    if "sketches" in legal and "sketches" not in settings:
        raise ConfigError("sketches", f"are missing: {task} looks for what they show", legal="a set and its root")

    tested = "test" in settings or part in ("valid", "test")
    if task == "recognition" and tested and "held_out" in settings:
        raise ConfigError("held_out", "is a share of what is fitted to, and there is a test set", legal="one of them")

    if task == "recognition" and part in ("valid", "test"):
        settings["test"] = limited(load(data, settings.get("test", root), classes=classes, part=part), limit)
        part = "train"
    elif "test" in settings:
        settings["test"] = limited(load(data, settings["test"], classes=classes, part=part), limit)
    chosen = limited(load(data, root, classes=classes, part=part), limit)
    for name in {"photos", "sketches"} & settings.keys():
        other, place = settings[name]
        settings[name] = limited(load_common(other, place, chosen.classes), limit)
        common = settings[name].classes
        if len(common) < len(chosen.classes):
            chosen = chosen.of_classes(common, f"{len(common)} of its {len(chosen.classes)} classes")
    if isinstance(model, SketchFusion):
        source = "in memory"
    else:
        source, model = os.fspath(model), SketchFusion.from_pretrained(model, device=device, dtype=dtype)
    extractor = Extractor(
        model, rows, batch_size=batch_size, ensemble=ensemble, size=size, progress=progress, source=source
    )
    model._warn_if_untrained()
    results: list[Result] = protocol(extractor, chosen, **settings)
    return results
