"""Shared fixtures: real classes at small widths in the published layouts, and the real data where it is present."""

import copy
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from sketchfusion import SketchFusion
from sketchfusion.cli import main

PROMPT_WIDTH = 24
TOKENS = ["!", '"', "#", "<|startoftext|>", "<|endoftext|>"]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def make_convolutional(name: str, **config: Any) -> Any:
    """A convolutional network of transformers', in eval mode; weights and statistics of batch norms are random."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor.data, 0.5, 1)
    return model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`command("encode", "a.png")` in this process, since importing torch takes seconds."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["sketchfusion", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return Done(exit.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def undrawable() -> str:
    """An SVG of too many lines with too thick a pen, which shows only when it is drawn."""
    zigzag = " ".join(f"{x % 100},{x * 37 % 100}" for x in range(20000))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><polyline stroke="black" fill="none" '
        f'stroke-width="60" points="{zigzag}"/></svg>'
    )


@pytest.fixture(autouse=True, scope="session")
def offline_and_small() -> None:
    """No test reaches the real Hub, and two threads are what a small machine has."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """`data("sketchy")` is the tar of that name; the test is skipped where there is none."""
    root = Path(os.environ.get("SKETCHFUSION_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / f"{name}.tar"
        if not path.is_file():
            pytest.skip(f"no {path}; name the folder of the data sets in SKETCHFUSION_DATA")
        return path

    return find


@pytest.fixture(scope="session")
def members(data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """`members("sketchy", "…/sketch/", 3)` extracts the first files under that prefix."""

    def extract(name: str, prefix: str, count: int) -> list[Path]:
        target = tmp_path_factory.mktemp(name)
        with tarfile.open(data(name)) as tar:
            chosen = [m for m in tar if m.isfile() and m.name.startswith(prefix)][:count]
            tar.extractall(target, members=chosen, filter="data")
        return [target / member.name for member in chosen]

    return extract


def write_diffusion(folder: Path, *, cross_attention_dim: int = PROMPT_WIDTH, **unet: Any) -> Path:
    """A Stable Diffusion of a few thousand parameters in diffusers' layout, text encoder and tokenizer included."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": (1, 2, 4, 4),
            "cross_attention_dim": cross_attention_dim,
            "use_linear_projection": True,
        }
        | unet
    ).save_pretrained(folder / "unet")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    ).save_pretrained(folder / "scheduler")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(TOKENS),
            hidden_size=cross_attention_dim,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=3,
            eos_token_id=4,
            pad_token_id=0,
        )
    ).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": TOKENS[3], "eos_token": TOKENS[4], "unk_token": TOKENS[4], "pad_token": "!"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    return folder


def write_semantic(folder: Path) -> Path:
    """A CLIP vision tower of a few thousand parameters in transformers' layout."""
    torch.manual_seed(1)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=16,
        )
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of both backbones, as published. Not to be written to."""
    root = tmp_path_factory.mktemp("backbones")
    return {
        "diffusion": write_diffusion(root / "diffusion"),
        "semantic": write_semantic(root / "semantic"),
    }


@pytest.fixture(scope="session")
def built(backbones: dict[str, Path]) -> SketchFusion:
    torch.manual_seed(2)
    return SketchFusion.from_backbones(
        **backbones, dtype="float32", device="cpu", aggregator_width=32, aggregator_grid=12
    )


@pytest.fixture
def untrained(built: SketchFusion) -> SketchFusion:
    """A small model fresh from its backbones, float32."""
    fresh = copy.deepcopy(built)
    fresh._warned_untrained = False  # whatever other tests did with that one
    return fresh


@pytest.fixture
def model(untrained: SketchFusion) -> SketchFusion:
    """The same with random adapters and aggregator, as if trained: nothing warns."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in untrained.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return untrained
