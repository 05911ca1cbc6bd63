"""Find points of a sketch in its photo: by a projection of frozen features, or through the adapters.

    python examples/correspondence.py --data shoes --root shoes [--adapters]

Prints PCK@10 of a quarter of the photos, held out with their sketches. Without --root, images are drawn.
"""

from dataclasses import replace

import torch
from synthetic import draw_shapes, options

from sketchfusion import Features, SketchFusion
from sketchfusion.data import DataSet, limited, load, split
from sketchfusion.tasks.correspondence import Correspondence, match, pck
from sketchfusion.tasks.retrieval import info_nce
from sketchfusion.training import Settings, train

args = options(__doc__, data="shoes", per_class=150, steps=40)
data = limited(load(args.data, args.root) if args.root else draw_shapes(), args.per_class)
kept, held_out = (replace(data, records=part) for part in split(data.records, 0.25))
model = SketchFusion.from_pretrained(args.model)


def encoded(part: DataSet) -> tuple[Features, list[torch.Tensor]]:
    """Of a sketch, its photo, the next sketch and so on: features, and the key points (P, 2) that both have."""
    shown = [(record, names) for *pair, names in part.pairs() for record in pair]
    points = [[(x, y) for name, x, y in sorted(record.points) if name in names] for record, names in shown]
    return model.encode(record.open() for record, _ in shown), [torch.tensor(places) for places in points]


def report(when: str, features: Features, points: list[torch.Tensor]) -> None:
    hits = []
    for i in range(0, len(points), 2):
        found, side = match(features[i], features[i + 1], points[i]), float(max(features[i + 1].geometry[:2]))
        hits.append(pck(found, points[i + 1], side, alpha=0.10))
    print(f"PCK@10 {when}: {torch.cat(hits).double().mean():.4f} ({len(hits)} pairs)")


features, points = encoded(held_out)
report("before", features, points)
if args.adapters:
    train(model, Correspondence(kept, pairs=8), args.out, Settings(steps=args.steps))
    report("through the adapters", *encoded(held_out))
else:  # a projection commutes with interpolation, so the features at the points are enough to train it
    at = [image.at(places) for image, places in zip(*encoded(kept), strict=True)]
    sketches, photos = torch.cat(at[::2]), torch.cat(at[1::2])
    project = torch.nn.Linear(sketches.shape[1], sketches.shape[1], bias=False)
    torch.nn.init.eye_(project.weight)  # begins with the features as they are
    optimizer = torch.optim.AdamW(project.parameters(), lr=3e-3)
    for _ in range(args.steps):
        loss = info_nce(project(sketches), project(photos), torch.eye(len(photos), dtype=torch.bool), temperature=0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dense = project(features.dense.movedim(1, -1)).movedim(-1, 1)
    report("on frozen features", replace(features, dense=dense), points)
