"""Find photos by sketches of classes never trained on: by a projection of frozen features, or through the adapters.

    python examples/retrieval_head.py --data sketchy --root sketchy [--adapters]

Every fifth class is kept apart; prints mAP@all of its sketches against its photos. Without --root, images are drawn.
"""

import argparse
from dataclasses import replace

import torch
from synthetic import draw_shapes

from sketchfusion import SketchFusion
from sketchfusion.data import DataSet, load
from sketchfusion.evaluation.protocols import limited
from sketchfusion.tasks.retrieval import Retrieval, info_nce, rank_metrics
from sketchfusion.training import Settings, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="sketchy", help="which set, see docs/data.md")
parser.add_argument("--root", help="its folder")
parser.add_argument("--per-class", type=int, default=10, help="sketches, and photos, of each class")
parser.add_argument("--model", default="mini")
parser.add_argument("--steps", type=int, default=100, help="on frozen features")
parser.add_argument("--adapters", type=int, nargs="?", const=40, default=0, metavar="STEPS", help="40, or so many")
parser.add_argument("--out", default="retrieval", help="folder for the checkpoint of --adapters")
args = parser.parse_args()

data = limited(load(args.data, args.root) if args.root else draw_shapes(), args.per_class)
apart = data.classes[::5]
kept = replace(data, records=tuple(record for record in data.records if record.label not in apart))
held_out = replace(data, records=tuple(record for record in data.records if record.label in apart))
model = SketchFusion.from_pretrained(args.model)


def encoded(part: DataSet) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Pooled features (N, D) of its sketches and of its photos, and their labels."""
    s, p = (model.encode((r.open() for r in kind), dense=False).pooled for kind in (part.sketches, part.photos))
    return s, p, [str(r.label) for r in part.sketches], [str(r.label) for r in part.photos]


tested = encoded(held_out)
print(f"{data.split}: {len(held_out.records)} images of {len(apart)} classes to test on, {len(kept.records)} others")
print(f"mAP@all before: {rank_metrics(*tested)['map_all']:.4f}")
if args.adapters:
    train(model, Retrieval(kept, classes=8), args.out, Settings(steps=args.adapters, lr=3e-4))
    print(f"mAP@all through the adapters: {rank_metrics(*encoded(held_out))['map_all']:.4f}")
else:
    sketches, photos, drawn, shown = encoded(kept)
    relevant = torch.tensor([[one == other for other in shown] for one in drawn])
    project = torch.nn.Linear(sketches.shape[1], sketches.shape[1], bias=False)
    torch.nn.init.eye_(project.weight)  # begins with the features as they are
    optimizer = torch.optim.AdamW(project.parameters(), lr=1e-3)
    for _ in range(args.steps):
        loss = info_nce(project(sketches), project(photos), relevant, temperature=0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figures = rank_metrics(project(tested[0]), project(tested[1]), *tested[2:])
    print(f"mAP@all on frozen features: {figures['map_all']:.4f}")
