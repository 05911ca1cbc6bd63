"""`config.json`: one file that describes a model completely. Every default is said once, here."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .errors import ConfigError, LoadError

FORMAT_VERSION = 1
POOLINGS = ("max",)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BackboneConfig:
    """Where a frozen backbone comes from, and what it expects to see."""

    source: str  # Hub repository, a folder, or "./name": a folder inside the checkpoint, or on the way from it
    revision: str | None  # commit of the Hub repository; null for a folder
    image_size: int  # side of the square canvas, pixels
    mean: tuple[float, float, float]  # pixels in [0, 1] become (pixels - mean) / std
    std: tuple[float, float, float]  # above 0


@dataclass(frozen=True)
class Config:
    """A SketchFusion model: its two backbones, what is injected where, what is tapped, how it is fused.

    Defaults are the paper's (CVPR 2025, section 4 and the released script) for Stable Diffusion 2.1.
    Sites and taps are named after the UNet's blocks: `down0` … `down3`, `mid`, `up0` … `up3`.
    """

    diffusion: BackboneConfig  # Stable Diffusion 1.x or 2.x, in diffusers' layout
    semantic: BackboneConfig  # CLIP or another vision network, in transformers' layout
    timestep: int = 195  # the one diffusion step at which the UNet runs
    noise_seed: int = 0  # noise n_j is drawn from seed noise_seed + j
    ensemble: int = 1  # noised copies averaged an image: 1, or an even number of antithetic members
    sites: tuple[str, ...] = ("down0", "down1", "down2", "down3", "up0", "up1", "up2")  # blocks that are injected into
    inject_skips: bool = True  # the last skip of a down block receives the injection too, as in the script
    taps: tuple[str, ...] = ("up0", "up1", "up2")  # blocks whose output, after injection, is aggregated
    aggregator_width: int = 1280  # D, channels of the dense map and length of the pooled vector
    aggregator_grid: int = 60  # the dense map is grid × grid cells
    aggregator_groups: int = 32  # groups of the aggregator's group norms
    pooling: str = "max"  # over the cells that lie on the image; the only one there is
    task: str | None = None  # what the adapters and the aggregator were trained for; null: untrained
    training_data: str | None = None  # what they saw
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # measured on data that was not trained on
    license: str | None = None  # terms of the weights; they follow the data, not the code
    format_version: int = FORMAT_VERSION  # of this file

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError("format_version", f"is {self.format_version}", legal=str(FORMAT_VERSION))
        for name in ("diffusion", "semantic"):
            backbone: BackboneConfig = getattr(self, name)
            if not all(0 < value < math.inf for value in backbone.std):
                raise ConfigError(f"{name}.std", f"is {list(backbone.std)}", legal="three numbers above 0")
            if backbone.image_size < 8 or (name == "diffusion" and backbone.image_size % 8):
                legal = "a positive multiple of 8" if name == "diffusion" else "8 or more"
                raise ConfigError(f"{name}.image_size", f"is {backbone.image_size}", legal=legal)
        for key, low in {
            "timestep": 0,
            "noise_seed": 0,
            "aggregator_grid": 1,
            "aggregator_groups": 1,
        }.items():
            check_count(key, getattr(self, key), low)
        check_ensemble(self.ensemble)
        if self.noise_seed >= 2**63:
            raise ConfigError("noise_seed", f"is {self.noise_seed}", legal="an integer from 0 to 2**63 - 1")
        for key in ("sites", "taps"):
            names = getattr(self, key)
            if len(set(names)) != len(names):
                raise ConfigError(key, f"names a block twice: {list(names)}", legal="each block once")
        if not self.taps:
            raise ConfigError("taps", "is empty", legal="one block of the UNet or more")
        if self.aggregator_width < 4 or self.aggregator_width % (4 * self.aggregator_groups):
            raise ConfigError(
                "aggregator_width",
                f"is {self.aggregator_width}, which {self.aggregator_groups} groups do not divide",
                legal=f"a multiple of 4 × aggregator_groups = {4 * self.aggregator_groups}",
            )
        if self.pooling not in POOLINGS:
            raise ConfigError("pooling", f"is {self.pooling!r}", legal=", ".join(POOLINGS))
        for name, value in self.metrics.items():
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise ConfigError(f"metrics.{name}", f"is {value!r}", legal="a number")
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Check keys and types of `values` and build the configuration; every key must be there.

        Raises:
            ConfigError: unknown or missing key, wrong type, or a value that is not legal.
        """
        version = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:  # before its keys, which may be others
            raise ConfigError("format_version", f"is {version!r}", legal=str(FORMAT_VERSION))
        return _build(cls, values, prefix="")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `config.json`.

        Raises:
            LoadError: the file is missing or not JSON.
            ConfigError: see `from_dict`.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LoadError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(values)

    def with_backbone(self, name: str, backbone: BackboneConfig) -> Self:
        """The same configuration with another `diffusion` or `semantic`."""
        changes: dict[str, Any] = {name: backbone}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def check_count(key: str, value: typing.Any, least: int = 1) -> None:
    """Raise a ConfigError unless `value` is an integer from `least` up."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(key, f"is {value!r}", legal=f"an integer from {least} up")


def check_ensemble(ensemble: int) -> None:
    """Raise a ConfigError unless `ensemble` is 1 or a positive even number (antithetic pairs ±n)."""
    if isinstance(ensemble, bool) or not isinstance(ensemble, numbers.Integral) or ensemble < 1:
        raise ConfigError("ensemble", f"is {ensemble!r}", legal="1 or an even number")
    if ensemble > 1 and ensemble % 2:
        raise ConfigError("ensemble", f"is {ensemble}; members come in pairs ±n", legal="1 or an even number")


def check_blocks(config: Config, blocks: tuple[str, ...]) -> None:
    """Raise a ConfigError unless every site and tap is one of the UNet's `blocks`, in order of execution."""
    for key in ("sites", "taps"):
        for name in getattr(config, key):
            if name not in blocks:
                raise ConfigError(key, f"this UNet has no block {name!r}", legal=", ".join(blocks))
    last = max(blocks.index(tap) for tap in config.taps)
    for site in config.sites:
        if blocks.index(site) > last:
            raise ConfigError(
                "sites",
                f"{site!r} comes after the last tap {blocks[last]!r} and would have no effect",
                legal=", ".join(blocks[: last + 1]),
            )


def unknown_key(key: str, known: typing.Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, naming the nearest one first."""
    known = list(known)
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"unknown key, did you mean {near[0]!r}?" if near else "unknown key"
    return ConfigError(key, hint, legal=", ".join(known))


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(prefix.rstrip(".") or "config.json", f"is {values!r}", legal=_describe(cls))
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(prefix + key, hints)
    for key in hints:
        if key not in values:
            raise ConfigError(prefix + key, "is missing", legal=_describe(hints[key]))
    return cls(**{key: _convert(values[key], hints[key], prefix + key) for key in hints})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` says, JSON lists becoming tuples; a ConfigError where it is not of that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    if origin is types.UnionType and isinstance(value, hint):  # a string or null
        return value
    if origin is tuple and isinstance(value, list | tuple):
        variadic = arguments[-1] is Ellipsis
        if variadic or len(value) == len(arguments):
            inner = [arguments[0]] * len(value) if variadic else arguments
            return tuple(_convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(key, f"is {value!r}", legal=_describe(hint))


def _describe(hint: Any) -> str:
    """A type in a user's words."""
    plain = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if hint in plain:
        return plain[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return f"{_describe(arguments[0])} or null"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {_describe(arguments[0])}"
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    if origin is dict:
        return f"an object, each value {_describe(arguments[1])}"
    return "an object with the keys " + ", ".join(typing.get_type_hints(hint))
