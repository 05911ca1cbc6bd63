"""The model card: a checkpoint's README, rendered from its configuration alone."""

from __future__ import annotations

import json

from .config import BackboneConfig, Config

# Front matter the Hub reads, then what a person needs: what it is for, what it saw, how to use it.
TEMPLATE = """\
---
library_name: sketchfusion
pipeline_tag: image-feature-extraction
license: {license}
tags: [sketch, image-feature-extraction, stable-diffusion, clip]{base_model}
---

# {title}

Adapters and aggregator of [SketchFusion](https://arxiv.org/abs/2503.14129): one extractor of dense and pooled
features for sketches and photos.

| | |
|---|---|
| Task | {task} |
| Trained on | {training_data} |
| Metrics | {metrics} |
| Diffusion backbone | {diffusion}, timestep {timestep} |
| Semantic backbone | {semantic} |
| Licence of these weights | {license_text} |

```python
from sketchfusion import SketchFusion

model = SketchFusion.from_pretrained("{name}")
features = model.encode("sketch.png")
features.pooled, features.dense  # ({width},), ({width}, {grid}, {grid})
```
"""


def render(config: Config, name: str | None = None) -> str:
    """The card of a checkpoint that `from_pretrained(name)` loads, where its name is known."""
    hub = [b.source for b in (config.diffusion, config.semantic) if b.revision is not None]
    return TEMPLATE.format(
        license="other" if config.license else "unknown",
        license_text=config.license or "not stated; it follows the training data and the backbones",
        base_model=f"\nbase_model: {json.dumps(hub)}" if hub else "",
        task=config.task or "none: untrained",
        training_data=config.training_data or "not stated",
        metrics=", ".join(f"{key} {value:.4g}" for key, value in config.metrics.items()) or "not stated",
        diffusion=_describe(config.diffusion),
        semantic=_describe(config.semantic),
        timestep=config.timestep,
        width=config.aggregator_width,
        grid=config.aggregator_grid,
        title=name or "SketchFusion checkpoint",
        name=name or "path/or/repository",
    )


def _describe(backbone: BackboneConfig) -> str:
    where = f"`{backbone.source}`"
    if backbone.source.startswith("./") and ".." not in backbone.source:
        where += " in this folder"
    if backbone.revision:
        where += f" at `{backbone.revision}`"
    return f"{where}, {backbone.image_size} px"
