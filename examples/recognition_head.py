"""Recognise sketches: by a linear head on frozen features, or by one that is trained along with the adapters.

    python examples/recognition_head.py --data tuberlin --root tuberlin [--adapters]

Prints Acc@1 of a quarter of the sketches, held out. Without --root, images are drawn.
"""

from dataclasses import replace

import torch
from synthetic import draw_shapes, options

from sketchfusion import SketchFusion
from sketchfusion.data import Record, limited, load, split
from sketchfusion.tasks.recognition import Recognition, accuracy
from sketchfusion.training import Settings, train

args = options(__doc__, data="tuberlin", per_class=16, steps=60)
data = limited(load(args.data, args.root) if args.root else draw_shapes(), args.per_class)
kept, held_out = split(data.sketches, 0.25)
torch.manual_seed(0)  # of the head's first weights
model = SketchFusion.from_pretrained(args.model)
task = Recognition(replace(data, records=kept), model.config.aggregator_width, batch_size=32)


def encoded(records: tuple[Record, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features (N, D) and labels (N,)."""
    features = model.encode((record.open() for record in records), dense=False)
    return features.pooled, torch.tensor([task.classes.index(str(record.label)) for record in records])


def report(when: str, features: torch.Tensor, labels: torch.Tensor) -> None:
    print(f"Acc@1 {when}: {accuracy(task.head(features), labels):.4f} ({len(labels)} sketches)")


known = tuple(record for record in held_out if record.label in task.classes)
if not known:
    raise SystemExit("nothing to test on: take more sketches (those of one photo stay on one side)")
tested = encoded(known)
report("before", *tested)
features, labels = encoded(kept)
optimizer = torch.optim.AdamW(task.head.parameters(), lr=0.01)
for _ in range(args.steps):
    loss = torch.nn.functional.cross_entropy(task.head(features), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
report("on frozen features", *tested)
if args.adapters:  # they go on from that head
    train(model, task, args.out, Settings(steps=args.steps))
    task.head.cpu()
    report("through the adapters", *encoded(known))
