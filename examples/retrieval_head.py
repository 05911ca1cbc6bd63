"""Find photos by sketches, of classes the head was not trained on: by a projection of frozen features, or the adapters.

    python examples/retrieval_head.py --data sketchy --root sketchy [--adapters]

Prints mAP@all of every fifth class, held out. Without --root, images are drawn.
"""

from dataclasses import replace

import torch
from synthetic import draw_shapes, options

from sketchfusion import SketchFusion
from sketchfusion.data import DataSet, limited, load
from sketchfusion.tasks.retrieval import Retrieval, info_nce, rank_metrics
from sketchfusion.training import Settings, train

args = options(__doc__, data="sketchy", per_class=10, steps=40)
data = limited(load(args.data, args.root) if args.root else draw_shapes(), args.per_class)
apart = data.classes[::5]
kept = replace(data, records=tuple(record for record in data.records if record.label not in apart))
held_out = replace(data, records=tuple(record for record in data.records if record.label in apart))
model = SketchFusion.from_pretrained(args.model)


def encoded(part: DataSet) -> list[torch.Tensor]:
    """Pooled features (N, D) of its sketches, and of its photos."""
    kinds = (part.sketches, part.photos)
    return [model.encode((record.open() for record in records), dense=False).pooled for records in kinds]


def report(when: str, sketches: torch.Tensor, photos: torch.Tensor) -> None:
    labels = ([str(record.label) for record in records] for records in (held_out.sketches, held_out.photos))
    found = rank_metrics(sketches, photos, *labels)
    print(f"mAP@all {when}: {found['map_all']:.4f} ({found['queries']} sketches, {found['gallery']} photos)")


tested = encoded(held_out)
report("before", *tested)
if args.adapters:
    train(model, Retrieval(kept, classes=8), args.out, Settings(steps=args.steps))
    report("through the adapters", *encoded(held_out))
else:
    sketches, photos = encoded(kept)
    relevant = torch.tensor([[p.label == s.label for p in kept.photos] for s in kept.sketches])
    project = torch.nn.Linear(sketches.shape[1], sketches.shape[1], bias=False)
    torch.nn.init.eye_(project.weight)  # begins with the features as they are
    optimizer = torch.optim.AdamW(project.parameters(), lr=1e-3)
    for _ in range(args.steps):
        loss = info_nce(project(sketches), project(photos), relevant, temperature=0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report("on frozen features", *(project(vectors) for vectors in tested))
