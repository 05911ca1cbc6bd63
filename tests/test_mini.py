"""The bundled models: small enough to ship, and better than their own architecture with random weights."""

import io
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel

from sketchfusion import SketchFusion, card
from sketchfusion.config import Config
from sketchfusion.data import class_names, limited, load, split
from sketchfusion.evaluation import protocols
from sketchfusion.evaluation.rows import Extractor
from sketchfusion.loading import BUNDLED
from sketchfusion.tasks.retrieval import rank_metrics

MINI = BUNDLED / "mini"
LIMIT = 25e6  # bytes of weights, of all bundled models
PARTS = ["semantic", "diffusion", "fused"]
A_CLASS = 25  # sketches and photos of each class: all there are

UNSEEN = class_names("sketchy-mini-unseen")
CAT = Path(__file__).parents[1] / "examples" / "images" / "cat.svg"

pytestmark = pytest.mark.skipif(not (MINI / "config.json").is_file(), reason="the bundled model is not in this tree")


@pytest.fixture(scope="module")
def unseen(data: Callable[[str], Path]) -> dict[str, tuple[list[Image.Image], torch.Tensor]]:
    """The first images of each unseen class of Sketchy, photos and sketches, with the class's number."""
    found: dict[tuple[str, str], list[Image.Image]] = defaultdict(list)
    with tarfile.open(data("sketchy")) as tar:
        for member in tar:
            kind, name = Path(member.name).parts[1::2][:2] if member.isfile() else ("", "")
            if name in UNSEEN and len(found[kind, name]) < A_CLASS:
                blob = tar.extractfile(member)
                assert blob is not None
                found[kind, name].append(Image.open(io.BytesIO(blob.read())).convert("RGB"))
    images, labels = defaultdict(list), defaultdict(list)
    for (kind, name), members in found.items():
        images[kind] += members
        labels[kind] += [UNSEEN.index(name)] * len(members)
    return {kind: (images[kind], torch.tensor(labels[kind])) for kind in images}


BOTH = ["mini", "mini-vit"]


@pytest.mark.parametrize("name", [*BOTH, "mini-correspondence", "mini-segmentation"])
def test_a_card_says_what_its_configuration_does(name: str) -> None:
    written = (BUNDLED / name / "README.md").read_text(encoding="utf-8")
    assert written == card.render(Config.load(BUNDLED / name / "config.json"), name)


def random_twin(folder: Path) -> SketchFusion:
    """The bundled architecture with every weight random, the adapters too."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(MINI / "semantic")).save_pretrained(folder / "semantic")
    diffusion = BUNDLED / "mini-vit" / "diffusion"
    for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        kind.from_config(kind.load_config(diffusion / part)).save_pretrained(folder / "diffusion" / part)
    shutil.copytree(diffusion / "scheduler", folder / "diffusion" / "scheduler")
    twin = SketchFusion.from_pretrained(
        MINI, device="cpu", diffusion=folder / "diffusion", semantic=folder / "semantic"
    )
    for module in [*twin.adapters.modules(), *twin.aggregator.modules()]:
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()
    nn.init.zeros_(twin.aggregator.mixing_weights)
    return twin


def mean_average_precision(model: SketchFusion, unseen: dict[str, tuple[list[Image.Image], torch.Tensor]]) -> float:
    """mAP@all, every sketch against every photo, by cosine of the pooled vectors."""
    vectors, ids = [], []
    for kind in ("sketch", "photo"):
        images, labels = unseen[kind]
        vectors.append(model.encode(images, dense=False, batch_size=16, progress=False).pooled)
        ids.append([UNSEEN[label] for label in labels])
    return float(rank_metrics(*vectors, *ids)["map_all"])


def test_it_beats_its_random_twin_fourfold_on_classes_it_has_not_seen(
    unseen: dict[str, tuple[list[Image.Image], torch.Tensor]], tmp_path: Path
) -> None:
    assert {kind: len(images) for kind, (images, _) in unseen.items()} == {
        "photo": A_CLASS * len(UNSEEN),
        "sketch": A_CLASS * len(UNSEEN),
    }
    trained = mean_average_precision(SketchFusion.from_pretrained("mini", device="cpu"), unseen)
    twin = random_twin(tmp_path)
    with pytest.warns(UserWarning, match="UNTRAINED"):
        untrained = mean_average_precision(twin, unseen)
    assert trained >= 4 * untrained, f"mAP@all {trained:.3f} against {untrained:.3f}"


@pytest.fixture(scope="module")
def extracted(data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def extract(name: str) -> Path:
        target = tmp_path_factory.mktemp(name)
        with tarfile.open(data(name)) as tar:
            tar.extractall(target, filter="data")
        return target

    return extract


def by_row(results: list[protocols.Result], figure: str) -> dict[str, float]:
    return {result.row: result.figures[figure] for result in results}


@pytest.mark.parametrize("name", ["mini-correspondence", "mini-segmentation"])
def test_the_checkpoints_of_one_task_share_the_backbones_of_mini_vit(name: str, tmp_path: Path) -> None:
    mini, other = (SketchFusion.from_pretrained(which, device="cpu", dtype="float32") for which in ("mini-vit", name))
    pixels, _ = mini.preprocess(CAT)
    for ours, theirs in zip(mini.embed(pixels[None]), other.embed(pixels[None]), strict=True):
        assert torch.equal(ours, theirs)
    assert other.config.task == name.removeprefix("mini-")
    assert mini.fingerprint != other.fingerprint
    assert sum(file.stat().st_size for file in (BUNDLED / name).rglob("*")) < 1e6
    other.save_pretrained(tmp_path)  # complete, wherever it goes
    again = SketchFusion.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert torch.equal(again.encode(CAT).pooled, other.encode(CAT).pooled)


def test_the_checkpoints_of_one_task_are_better_at_it(extracted: Callable[[str], Path]) -> None:
    """On the shoes and the animals that their training kept apart."""
    shoes = load("shoes", extracted("shoes"))
    shoes = replace(shoes, records=split(shoes.records, 0.33)[1])
    animals = load("voc", extracted("voc_animals"), classes=["cat", "dog", "horse"])
    animals = replace(animals, records=split(animals.records, 0.2)[1])
    queries = load("sketchy", extracted("sketchy"), classes=["cat", "dog", "horse"])

    def figures(name: str) -> Extractor:
        return Extractor(SketchFusion.from_pretrained(name, device="cpu"), ["fused"], progress=False)

    points = [
        by_row(protocols.correspondence(figures(name), shoes), "pck_10")["fused"]
        for name in ("mini-correspondence", "mini-vit")
    ]
    masks = [
        by_row(protocols.segmentation(figures(name), limited(animals, 20), queries), "miou")["fused"]
        for name in ("mini-segmentation", "mini-vit")
    ]
    assert points[0] > points[1]
    assert masks[0] > masks[1]


def test_its_fused_map_finds_points_that_neither_part_finds(extracted: Callable[[str], Path]) -> None:
    """On the third of the shoes that its training kept apart."""
    shoes = load("shoes", extracted("shoes"))
    apart = replace(shoes, records=split(shoes.records, 0.33)[1])
    extractor = Extractor(SketchFusion.from_pretrained("mini", device="cpu"), PARTS, progress=False)
    pck = by_row(protocols.correspondence(extractor, apart), "pck_10")
    assert pck["fused"] >= 2 * max(pck["semantic"], pck["diffusion"])
    assert pck["fused"] > pck["same-position"]


def test_its_fused_map_is_the_mask_of_an_animal_it_had_no_mask_of(extracted: Callable[[str], Path]) -> None:
    photos, sketches = load("voc", extracted("voc_animals"), classes=["sheep"]), extracted("sketchy")
    extractor = Extractor(SketchFusion.from_pretrained("mini", device="cpu"), PARTS, progress=False)
    queries = load("sketchy", sketches, classes=["sheep"])
    miou = by_row(protocols.segmentation(extractor, limited(photos, 60), queries), "miou")
    assert miou["fused"] > max(miou["semantic"], miou["diffusion"], miou["whole-photo"])


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: float16 is for GPUs")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "mean", "hundredth", "least"),
    [
        ("mini", "cpu", "bfloat16", 0.997, 0.985, 0.98),
        ("mini-vit", "cpu", "bfloat16", 0.9999, 0.9997, 0.99),
        pytest.param("mini", "cuda", "float16", 0.9999, 0.9997, 0.999, marks=ON_CUDA),
        pytest.param("mini-vit", "cuda", "float16", 0.9999, 0.9997, 0.999, marks=ON_CUDA),
    ],
)
def test_half_precision_keeps_the_features(
    name: str, device: str, dtype: str, mean: float, hundredth: float, least: float
) -> None:
    """Cosine of dense cells with those of float32, of two images and of each alone: mean, first percentile, least."""
    images = [Path(__file__).parents[1] / "examples" / "images" / name for name in ("cat.svg", "cat.jpg")]
    exact = SketchFusion.from_pretrained(name, device="cpu", dtype="float32").encode(images).dense
    model = SketchFusion.from_pretrained(name, device=device, dtype=dtype)
    for rough in (model.encode(images).dense, torch.stack([model.encode(image).dense.cpu() for image in images])):
        cosines = torch.nn.functional.cosine_similarity(exact, rough.float(), dim=1).flatten().sort().values
        assert cosines.mean() > mean
        assert cosines[len(cosines) // 100] > hundredth
        assert cosines[0] > least


def test_their_weights_are_small_and_in_half_precision() -> None:
    files = sorted(BUNDLED.rglob("*.safetensors"))
    assert len(files) == 8
    assert sum(file.stat().st_size for file in files) < LIMIT
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            assert kinds - {"I64"} == {"F16"}  # of batch norms, how many batches they saw


@pytest.mark.parametrize("name", BOTH)
def test_their_cards_say_what_they_saw_and_under_which_terms(name: str) -> None:
    config = Config.load(BUNDLED / name / "config.json")
    assert config.task
    assert config.license
    assert config.training_data
    assert all(name in config.training_data for name in ("Sketchy", "TU-Berlin", "Quick, Draw!", "ImageNet"))
