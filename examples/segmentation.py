"""Segment in a photo what a sketch shows: by a projection of frozen features, or through the adapters.

    python examples/segmentation.py --data voc --root voc --sketches tuberlin --sketches-root tuberlin [--adapters]

Prints mIoU and pAcc of held-out photos and sketches, a fifth of each. Without --root, images are drawn.
"""

from dataclasses import replace

import numpy as np
import torch
from synthetic import draw_shapes, options

from sketchfusion import Features, SketchFusion
from sketchfusion.data import limited, load, load_common, split
from sketchfusion.tasks import Sample
from sketchfusion.tasks.segmentation import Segmentation, mask_iou, pixel_accuracy, predict, similarity
from sketchfusion.training import Settings, train

args = options(__doc__, data="voc", sketches="tuberlin", sketches_root="", per_class=20, steps=40)
data = load(args.data, args.root) if args.root else draw_shapes()
if args.sketches_root:
    data = replace(data, records=data.photos + load_common(args.sketches, args.sketches_root, data.classes).sketches)
kept, held_out = (replace(data, records=part) for part in split(limited(data, args.per_class).records, 0.2))
masks = {photo: torch.from_numpy(photo.read_mask()) for photo in kept.photos + held_out.photos}
model = SketchFusion.from_pretrained(args.model)
task = Segmentation(kept, kept, pairs=8, others=0.1)  # at the default, so few photos teach to find nothing
project = torch.nn.Conv2d(model.config.aggregator_width, model.config.aggregator_width, 1, bias=False)
torch.nn.init.dirac_(project.weight)  # begins with the features as they are


def projected(features: Features) -> Features:
    return replace(features, dense=project(features.dense), pooled=project(features.pooled[..., None, None]).flatten(1))


def report(when: str, features: Features) -> None:
    of = dict(zip(held_out.records, features, strict=True))
    pairs = [(p, s) for p in held_out.photos for s in held_out.sketches if p.label == s.label]
    found = [(predict(similarity(of[sketch].pooled, of[photo])), masks[photo]) for photo, sketch in pairs]
    for name, metric in {"mIoU": mask_iou, "pAcc": pixel_accuracy}.items():
        print(f"{name} {when}: {np.mean([metric(*both) for both in found]):.4f} ({len(pairs)} pairs)")


tested = model.encode(record.open() for record in held_out.records)
report("before", tested)
if args.adapters:
    train(model, task, args.out, Settings(steps=args.steps))
    report("through the adapters", model.encode(record.open() for record in held_out.records))
else:
    samples = [[Sample(r, {}, masks.get(r)) for r in task.batch(np.random.default_rng(seed))] for seed in range(8)]
    encoded = [model.encode(sample.record.open() for sample in batch) for batch in samples]
    optimizer = torch.optim.AdamW(project.parameters(), lr=1e-3)
    for step in range(args.steps):
        loss, _ = task.loss(projected(encoded[step % 8]), samples[step % 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report("on frozen features", projected(tested))
