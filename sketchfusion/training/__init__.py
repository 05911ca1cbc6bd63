"""Training adapters, aggregator and heads: the loop, the views it looks at, the cache of frozen work, checkpoints."""

from .loop import Settings, train

__all__ = ["Settings", "train"]
