"""From what a user names to loaded networks, and to the configuration that describes them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from .backbones import diffusion as diffusion_backbone
from .backbones import semantic as semantic_backbone
from .config import BackboneConfig, Config, unknown_key
from .errors import ConfigError, LoadError
from .hub import Location

BUNDLED = Path(__file__).parent / "bundled"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
MARKERS = {"diffusion": "unet/config.json", "semantic": "config.json"}  # the file that tells a backbone's commit
INSIDE = "./"  # prefix of a backbone's source: a folder inside the checkpoint
Origin = Location | Any  # where a backbone came from: a location, or the loaded module that the caller passed
PathLike = str | os.PathLike[str]


class Access(NamedTuple):
    """How the Hub is reached."""

    token: str | bool | None
    cache_dir: PathLike | None
    local_files_only: bool


@dataclasses.dataclass(frozen=True)
class Networks:
    """The loaded parts of both backbones, and where they came from."""

    vae: Any
    unet: Any
    scheduler: Any
    vision: Any
    origins: dict[str, Origin]
    variant: str | None

    @classmethod
    def load(
        cls,
        origins: dict[str, Origin],
        dtype: torch.dtype,
        variant: str | None,
        *,
        taps: Collection[str] | None = None,
    ) -> Self:
        """Both backbones; with `taps` only what encoding to these needs of them."""
        vae, unet, scheduler = diffusion_backbone.load(origins["diffusion"], dtype, variant, taps=taps)
        vision = semantic_backbone.load(origins["semantic"], dtype)
        return cls(vae, unet, scheduler, vision, origins, variant)

    @functools.cached_property
    def layout(self) -> semantic_backbone.Layout:
        """How the semantic backbone cuts its canvas: a convolutional one is run to see that, and once is enough."""
        return semantic_backbone.layout(self.vision)


def find_checkpoint(source: PathLike, revision: str | None, access: Access) -> Location:
    """A bundled name, else an existing folder, else a Hub repository, whose name may end in `@` and the revision."""
    if not isinstance(source, str | os.PathLike):
        raise LoadError(f"a checkpoint is a bundled name, a folder or a Hub repository, not {type(source).__name__}")
    name = os.fspath(source)
    bundled = sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())
    if revision is None and "@" in name and name not in bundled and not Path(name).is_dir():
        name, _, revision = name.partition("@")
    if revision is not None and (name in bundled or Path(name).is_dir()):
        raise LoadError(f"revision={revision!r} is for Hub repositories, and {name!r} is on this disk")
    if name in bundled:
        return Location(str(BUNDLED / name))
    if Path(name).is_file():
        raise LoadError(f"{name!r} is a file: a checkpoint is the folder that it lies in")
    if not name or revision == "" or (not Path(name).is_dir() and name.count("/") != 1):
        raise LoadError(
            f"{name!r} is no bundled model ({', '.join(bundled)}), no existing folder, and no Hub repository "
            "(owner/name, or owner/name@revision)"
        )
    return find_origin(name, revision, access, "config.json")


def find_origin(source: Any, revision: str | None, access: Access, marker: str) -> Origin:
    """What `source` stands for; a Hub repository at the commit that its file `marker` comes from now."""
    if not isinstance(source, str | os.PathLike):
        return source
    text = os.fspath(source)
    if Path(text).is_dir():
        return Location(str(Path(text).resolve()))
    location = Location(
        text,
        revision,
        token=access.token,
        cache_dir=None if access.cache_dir is None else os.fspath(access.cache_dir),
        local_files_only=access.local_files_only,
    )
    try:
        return location.pinned(marker)
    except LoadError as error:
        raise LoadError(f"{error}; nor is there a folder {text!r} here") from error


def recorded(backbone: BackboneConfig, origin: Origin) -> BackboneConfig:
    """`backbone` with the place that `origin` is, at its commit."""
    if not isinstance(origin, Location):
        return dataclasses.replace(backbone, source=type(origin).__name__, revision=None)
    return dataclasses.replace(backbone, source=origin.source, revision=origin.revision)


# Settings of what a backbone sees.
SEES = tuple(f"{name}_{key}" for name in MARKERS for key in ("image_size", "mean", "std"))


def check_settings(settings: dict[str, Any]) -> None:
    """Raise a ConfigError for what `default_config` does not know, which takes no backbones to see."""
    known = [*(field.name for field in dataclasses.fields(Config) if field.name not in MARKERS), *SEES]
    for key in settings:
        if key not in known:
            raise unknown_key(key, known)


def default_config(networks: Networks, settings: dict[str, Any]) -> Config:
    """The paper's configuration for these backbones, with the caller's settings on top."""
    unet, vision = networks.unet, networks.vision
    given = {"semantic_mean", "semantic_std"} <= settings.keys()
    published = None if given else semantic_backbone.published_normalisation(networks.origins["semantic"])
    if published is None and not given:
        raise ConfigError(
            "semantic_mean",
            "is not known: the semantic backbone comes without a preprocessor_config.json",
            legal="three numbers, passed as semantic_mean= and semantic_std=",
        )
    given_size = "semantic_image_size" in settings
    native = (
        None if given_size else semantic_backbone.published_size(vision, networks.layout, networks.origins["semantic"])
    )
    if native is None and not given_size:
        raise ConfigError(
            "semantic_image_size",
            "is not known: the semantic backbone does not say what it was trained on",
            legal=f"a multiple of the patch size {networks.layout.patch}",
        )
    scale = 2 ** (len(networks.vae.config.block_out_channels) - 1)
    half = (0.5, 0.5, 0.5)
    diffusion = BackboneConfig("", None, unet.config.sample_size * scale, half, half)
    # What is not known was given, and is put in and checked with the other settings below.
    semantic = BackboneConfig("", None, native or 224, *(published or (half, half)))
    width = settings.get("aggregator_width", Config.aggregator_width)
    base = Config(
        diffusion=recorded(diffusion, networks.origins["diffusion"]),
        semantic=recorded(semantic, networks.origins["semantic"]),
    ).to_dict()
    if isinstance(width, int) and width >= 4:  # what else it may be is refused below
        base["aggregator_groups"] = math.gcd(width // 4, unet.config.norm_num_groups)
    for key in SEES:
        if key in settings:
            name, _, inner = key.partition("_")
            base[name][inner] = settings[key]
    return Config.from_dict(base | {key: value for key, value in settings.items() if key not in SEES})


def resolve_device(device: str | torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                "device", f"{str(device)!r} cannot be used here ({reason})", legal="auto, cpu, cuda, cuda:1, mps"
            ) from error
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")  # of one process among several, each with a GPU of its own
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    return torch.device("cpu")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else torch.float32
    resolved = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ConfigError("dtype", f"is {dtype!r}", legal=", ".join(["auto", *DTYPES]))
    if resolved is torch.float16 and device.type == "cpu":
        warnings.warn("float16 on a CPU is many times slower than float32; use dtype='auto'", UserWarning, stacklevel=3)
    return resolved


def _cpu_has_bfloat16() -> bool:
    """AMX or AVX512-BF16, in whose absence bfloat16 is emulated and slow."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
