"""SketchFusion: universal features for sketches and photos.

The public names load on first use, so that `import sketchfusion` needs neither torch nor diffusers.
"""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ImageError, LoadError, SketchFusionError

if TYPE_CHECKING:
    from .config import Config
    from .features import Features
    from .images import Geometry
    from .model import SketchFusion
    from .strokes import Strokes

__version__ = "0.1.0"
_ROOMS = {
    "Config": "config",
    "Features": "features",
    "Geometry": "images",
    "SketchFusion": "model",
    "Strokes": "strokes",
}
__all__ = [
    "Config",
    "ConfigError",
    "Features",
    "Geometry",
    "ImageError",
    "LoadError",
    "SketchFusion",
    "SketchFusionError",
    "Strokes",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
