"""Recognise sketches by a linear head on frozen features, and then by training the adapters together with it.

    python examples/recognition_head.py --data tuberlin --root tuberlin [--adapters]

Prints Acc@1 on a fifth of the sketches, which nothing is trained on. Without --root, the sketches are drawn shapes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from synthetic import draw_shapes

from sketchfusion import SketchFusion
from sketchfusion.data import Record, load, split
from sketchfusion.evaluation.protocols import limited
from sketchfusion.tasks.recognition import Recognition, accuracy
from sketchfusion.training import Settings, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="tuberlin", help="which set, see docs/data.md")
parser.add_argument("--root", help="its folder")
parser.add_argument("--per-class", type=int, default=16, help="sketches of each class")
parser.add_argument("--model", default="mini")
parser.add_argument("--steps", type=int, default=300, help="on frozen features")
parser.add_argument("--adapters", type=int, nargs="?", const=40, default=0, metavar="STEPS", help="40, or so many")
parser.add_argument("--out", default="recognition", help="folder for the checkpoint of --adapters")
args = parser.parse_args()

data = limited(load(args.data, args.root) if args.root else draw_shapes(), args.per_class)
kept, held_out = split(data.sketches, 0.2)
model = SketchFusion.from_pretrained(args.model)
task = Recognition(replace(data, records=kept), model.config.aggregator_width, batch_size=32)
known = [record for record in held_out if record.label in task.classes]


def encoded(records: Sequence[Record]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features (N, D) and labels (N,)."""
    features = model.encode((record.open() for record in records), dense=False)
    return features.pooled, torch.tensor([task.classes.index(str(record.label)) for record in records])


(features, labels), (test_features, test_labels) = encoded(kept), encoded(known)
print(f"{data.split}: {len(kept)} sketches of {len(task.classes)} classes, {len(known)} others to test on")
print(f"Acc@1 of the untrained head: {accuracy(task.head(test_features), test_labels):.4f}")
optimizer = torch.optim.AdamW(task.head.parameters(), lr=0.01)
for _ in range(args.steps):
    loss = torch.nn.functional.cross_entropy(task.head(features), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"Acc@1 on frozen features: {accuracy(task.head(test_features), test_labels):.4f}")

if args.adapters:  # goes on from that head
    train(model, task, args.out, Settings(steps=args.adapters, lr=3e-4))
    test_features, _ = encoded(known)
    print(f"Acc@1 through the adapters: {accuracy(task.head.cpu()(test_features), test_labels):.4f}")
