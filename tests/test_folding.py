"""Folding changes nothing but the work: every folded part beside the plain one, in float64 where a weight is folded."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_convolutional
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sketchfusion import LoadError, SketchFusion
from sketchfusion.backbones import published, shared_copy
from sketchfusion.backbones.diffusion import DiffusionBackbone
from sketchfusion.backbones.folding import FoldedCrossAttention, fold_unet
from sketchfusion.backbones.semantic import SemanticBackbone, layout
from sketchfusion.fusion.aggregation import Aggregator, Bottleneck
from sketchfusion.fusion.injection import Adapters

TIMESTEP = 195
UPS = ("up0", "up1", "up2", "up3")
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": 24,
    "use_linear_projection": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd21": {},
    "sd15": {"use_linear_projection": False, "attention_head_dim": 4},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},  # leaves the time embedding unfolded
}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def make_unet(kind: str = "sd21") -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL | KINDS[kind])


def make_vae(**settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        **settings,
    )


def inputs() -> tuple[Tensor, Tensor]:
    """Noised latents of 3 images, 13 × 13, which 8 does not divide; a prompt of 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 13, 13, generator=generator), torch.randn(7, 24, generator=generator)


def backbone(unet: Any, prompt: Tensor, dtype: torch.dtype, *, fold: bool, vae: Any = None) -> DiffusionBackbone:
    """On copies, so that `unet` and `vae` stay plain."""
    parts = [nn.Module.to(shared_copy(part), dtype) for part in (vae or make_vae(), unet)]
    return DiffusionBackbone(*parts, alpha_bar=0.8, null_prompt=prompt, taps=UPS, timestep=TIMESTEP, fold=fold)


@torch.no_grad()
def diffusers_maps(unet: Any, noised: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """What the up blocks return while diffusers runs the whole UNet."""
    maps: dict[str, Tensor] = {}
    for name, block in zip(UPS, unet.up_blocks, strict=True):
        block.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output}))
    unet.eval()(noised, TIMESTEP, encoder_hidden_states=prompt.expand(len(noised), -1, -1))
    return maps


# ---- UNet


@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_unet_equals_diffusers_own(kind: str) -> None:
    unet, (noised, prompt) = make_unet(kind), (x.double() for x in inputs())
    folded = backbone(unet, prompt, torch.float64, fold=True)
    plain = backbone(unet, prompt, torch.float64, fold=False)
    reference = diffusers_maps(nn.Module.to(unet, torch.float64), noised, prompt)
    for diffusion in (folded, plain):
        ours = diffusion(noised, {}, inject_skips=True)
        for tap in UPS:
            assert relative_error(ours[tap], reference[tap]) < 1e-12, tap


def test_what_is_folded_is_gone() -> None:
    unet = backbone(make_unet(), inputs()[1], torch.float32, fold=True).unet
    names = list(unet.state_dict())
    assert not [name for name in names if "time_emb" in name or "attn2.to_k" in name or "attn2.to_v" in name]
    assert set(names) < set(make_unet().state_dict())  # those that stay keep their names; constants are not saved
    assert not any(isinstance(m, Attention) and m.is_cross_attention for m in unet.modules())


class Wrapped(nn.Module):
    """A layer as peft wraps it: its weight is the base layer's, and what it returns is more."""

    def __init__(self, base: Any):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


@pytest.mark.parametrize("name", ["attentions.0.transformer_blocks.0.attn2.to_v", "resnets.0.conv1"])
def test_a_lora_has_to_be_fused_first(name: str) -> None:
    unet = make_unet()
    block = unet.down_blocks[0]
    block.set_submodule(name, Wrapped(block.get_submodule(name)))
    with pytest.raises(LoadError, match=r"Wrapped, whose weights.*fuse_lora"):
        fold_unet(unet, TIMESTEP, torch.zeros(7, SMALL["cross_attention_dim"]))


def test_the_time_embedding_stays_where_it_cannot_be_folded() -> None:
    unet = backbone(make_unet("scale and shift"), inputs()[1], torch.float32, fold=True).unet
    assert unet.time_embedding is not None
    assert all(resnet.time_emb_proj is not None for resnet in unet.mid_block.resnets)
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn2, FoldedCrossAttention)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_the_folded_unet_are_those_of_the_plain_one(checkpointing: bool) -> None:
    unet, (noised, prompt) = make_unet(), (x.double() for x in inputs())
    gradients: list[Tensor] = []
    for fold in (True, False):
        diffusion = backbone(unet, prompt, torch.float64, fold=fold)
        if checkpointing:
            diffusion.unet.enable_gradient_checkpointing()
        injected = torch.full((1, 8, 1, 1), 0.1, dtype=torch.float64, requires_grad=True)
        maps = diffusion(noised, {"down0": lambda hidden, x=injected: hidden + x}, inject_skips=True)
        sum(m.square().sum() for m in maps.values()).backward()
        assert injected.grad is not None
        gradients.append(injected.grad)
    assert gradients[1].norm() > 0
    assert relative_error(*gradients) < 1e-12


def test_a_batch_attends_to_one_copy_of_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.extend((key.shape, value.shape))
        return attend(query, key, value)

    attention = Attention(query_dim=16, cross_attention_dim=24, heads=4, dim_head=4).double()
    prompt, tokens = torch.randn(7, 24).double(), torch.randn(3, 50, 16).double()
    expected = attention(tokens, encoder_hidden_states=prompt.expand(3, -1, -1))
    monkeypatch.setattr("sketchfusion.backbones.folding.F.scaled_dot_product_attention", watched)
    assert relative_error(FoldedCrossAttention(attention, prompt)(tokens), expected) < 1e-12
    assert shapes == [(1, 4, 7, 4)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_folding_loses_nothing(dtype: torch.dtype) -> None:
    unet, vae, (noised, prompt) = make_unet(), make_vae(), inputs()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    exact = backbone(unet, prompt, torch.float64, fold=False, vae=vae)
    maps, latents = exact(noised.double(), {}, inject_skips=True), exact.encode(pixels)
    errors: dict[bool, float] = {}
    for fold in (True, False):
        diffusion = backbone(unet, prompt, dtype, fold=fold)
        ours = diffusion(noised.to(dtype), {}, inject_skips=True)
        errors[fold] = sum(relative_error(ours[tap], maps[tap]) for tap in UPS)
    assert errors[True] < 1.1 * errors[False]

    folded = backbone(unet, prompt, dtype, fold=True, vae=vae).encode(pixels)
    plain = nn.Module.to(copy.deepcopy(vae), dtype).encode((pixels * 2 - 1).to(dtype)).latent_dist.mode()
    plain_error = relative_error(plain * vae.config.scaling_factor, latents)
    assert relative_error(folded, latents) < 1.1 * plain_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """Each is the nearest number of the compute dtype to what the loaded weights give in float64."""
    unet, vae, prompt = (nn.Module.to(make_unet(), dtype), nn.Module.to(make_vae(), dtype), inputs()[1])
    rounded = backbone(unet, prompt, dtype, fold=True, vae=vae)
    exact = backbone(unet, prompt.double(), torch.float64, fold=True, vae=vae)
    for kind in ("named_parameters", "named_buffers"):
        references = dict(getattr(exact, kind)())
        for name, value in getattr(rounded, kind)():
            if name not in ("mean", "std"):
                error, half = (value.double() - references[name]).abs(), torch.finfo(dtype).eps / 2
                assert (error <= 1.001 * half * references[name].abs() + 1e-6).all(), name


# ---- VAE


@pytest.mark.parametrize("quant", [True, False])
def test_the_folded_vae_gives_the_scaled_mode(quant: bool) -> None:
    vae = make_vae(use_quant_conv=quant)
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ours = backbone(make_unet(), inputs()[1], torch.float64, fold=True, vae=vae).encode(pixels)
    plain = nn.Module.to(vae, torch.float64).eval()
    with torch.no_grad():
        reference = plain.encode(pixels * 2 - 1).latent_dist.mode() * plain.config.scaling_factor
    assert ours.shape == (2, 4, 16, 16)
    assert relative_error(ours, reference) < 1e-12


# ---- convolutional semantic backbones

CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2]},
    "MobileNetV2": {"depth_multiplier": 0.25},
    "EfficientNet": {"depth_coefficient": 0.5, "width_coefficient": 0.5, "hidden_dim": 640},
    "ConvNext": {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
}


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def semantic_backbone(network: Any, **settings: Any) -> SemanticBackbone:
    copied = shared_copy(network)
    means: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return SemanticBackbone(copied, layout(copied), dtype=torch.float64, image_size=64, **means, **settings)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_batch_norms_are_folded_into_the_convolutions_before_them(name: str) -> None:
    plain = make_convolutional(name, **CONVOLUTIONAL[name]).double()
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = plain(pixels).last_hidden_state
    folded, unfolded = semantic_backbone(plain), semantic_backbone(plain, fold=False)
    assert not batch_norms(folded)
    assert len(batch_norms(unfolded)) == len(batch_norms(plain))
    assert relative_error(folded(pixels), before) < 1e-12
    assert torch.equal(plain(pixels).last_hidden_state, before)  # what was passed is as it was


def test_gates_that_are_always_open_are_left_out() -> None:
    model = make_convolutional("EfficientNet", **CONVOLUTIONAL["EfficientNet"]).double()
    gates = [block.squeeze_excite for block in model.encoder.blocks]
    for gate in gates[:3]:
        nn.init.zeros_(gate.expand.weight)
        nn.init.constant_(gate.expand.bias, 40)
    nn.init.zeros_(gates[0].expand.bias)  # half open
    nn.init.constant_(gates[3].expand.bias, 40)  # open for this image perhaps
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    folded = semantic_backbone(model)
    kept = [not isinstance(block.squeeze_excite, nn.Identity) for block in folded.model.encoder.blocks]
    assert kept == [True, False, False] + [True] * (len(gates) - 3)
    assert relative_error(folded(pixels), model(pixels).last_hidden_state) < 1e-12


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


class Several(nn.Module):
    """One batch norm that only scales and shifts what a convolution gives, among others that do more."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, stride=2 if i == 0 else 1) for i in range(5))
        self.convs.append(Standardized(3, 3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3, affine=i != 1, track_running_stats=i != 2) for i in range(7))

    def forward(self, pixels: Tensor) -> Any:
        x = self.convs[0](pixels)
        x = self.norms[0](x) + F.relu(F.relu(x))  # also taken as it is
        x = self.norms[1](self.convs[1](x))  # the one to fold
        x = self.norms[2](self.convs[2](x))  # by the batch's own statistics
        x = self.norms[3](self.convs[3](x)) + self.norms[4](self.convs[3](x))  # one convolution, twice
        x = self.norms[5](F.relu(self.convs[4](x)))  # not at once
        x = self.norms[6](self.convs[5](x))  # its weights are not what it multiplies by
        return SimpleNamespace(last_hidden_state=x)


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_batch_norms_that_do_more_than_follow_a_convolution_stay(around: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Several().double().eval()
    for norm in batch_norms(model):
        if norm.running_mean is not None and norm.running_var is not None:
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 1)
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with around():
        folded = semantic_backbone(model)
        assert [isinstance(norm, nn.Identity) for norm in folded.model.norms] == [False, True] + [False] * 5
        assert relative_error(folded(pixels), model(pixels).last_hidden_state) < 1e-12


# ---- aggregator and adapters


def plain_bottleneck(bottleneck: Bottleneck, x: Tensor, side: int) -> Tensor:
    """As the paper has it: resize, then everything else."""
    x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    h = F.relu(bottleneck.norm1(bottleneck.conv1(x)))
    h = F.relu(bottleneck.norm2(bottleneck.conv2(h)))
    return F.relu(bottleneck.norm3(bottleneck.conv3(h)) + bottleneck.shortcut(x))


@pytest.mark.parametrize("in_width", [16, 32])  # with and without a projection in the shortcut
@pytest.mark.parametrize("size", [(4, 4), (5, 9), (8, 8), (12, 7), (13, 13)])
def test_a_bottleneck_projects_the_smaller_map(in_width: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    side, bottleneck = 8, Bottleneck(in_width, 32, 4)
    for module in bottleneck.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    bottleneck.double()
    x = torch.randn(2, in_width, *size, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        ours = bottleneck(x, side)
    assert relative_error(ours, plain_bottleneck(bottleneck, x, side)) < 1e-12

    gradients = torch.autograd.grad(ours.square().sum(), list(bottleneck.parameters()))
    plain = plain_bottleneck(bottleneck, x, side).square().sum()
    for ours_, reference in zip(gradients, torch.autograd.grad(plain, list(bottleneck.parameters())), strict=True):
        assert relative_error(ours_, reference) < 1e-10

    projected = min(size[0] * size[1], side**2) * in_width * (8 if in_width == 32 else 8 + 32)
    assert counter.get_total_flops() == 2 * 2 * (projected + side**2 * (9 * 8 * 8 + 8 * 32))


def test_all_adapters_are_one_matrix_product() -> None:
    torch.manual_seed(0)
    adapters = Adapters(16, {"down0": 8, "mid": 32, "up1": 16})
    assert list(adapters.state_dict()) == [
        f"sites.{site}.{name}" for site in ("down0", "mid", "up1") for name in ("weight", "bias")
    ]
    adapters.sites.double()  # past what keeps masters in float32
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    hidden = {site: torch.randn(2, a.out_channels, 9, 7, dtype=torch.float64) for site, a in adapters.sites.items()}
    with FlopCounterMode(display=False) as counter:
        hooks = adapters(tokens)
    assert len(counter.get_flop_counts()["Global"]) == 1
    assert counter.get_total_flops() == 2 * 2 * 25 * 16 * (8 + 32 + 16)
    for site, adapter in adapters.sites.items():
        ours = hooks[site](hidden[site])
        resized = F.interpolate(adapter(tokens), size=(9, 7), mode="bilinear", align_corners=False)
        assert relative_error(ours, hidden[site] + resized) < 1e-12
        parameters = list(adapter.parameters())
        gradients = torch.autograd.grad(ours.square().sum(), parameters, retain_graph=True)
        references = torch.autograd.grad((hidden[site] + resized).square().sum(), parameters)
        for gradient, reference in zip(gradients, references, strict=True):
            assert relative_error(gradient, reference) < 1e-12


def test_no_site_no_hook() -> None:
    assert Adapters(16, {})(torch.randn(2, 16, 5, 5)) == {}


# ---- the whole model


def test_saved_backbones_are_the_published_ones(
    model: SketchFusion, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, include_backbones=True)
    for part in ("unet", "vae"):
        for path in (backbones["diffusion"] / part).iterdir():
            assert (tmp_path / "diffusion" / part / path.name).read_bytes() == path.read_bytes()


def test_constants_follow_the_model(model: SketchFusion) -> None:
    def constants() -> list[Tensor]:
        folded = [m for m in model.diffusion.unet.modules() if isinstance(m, FoldedCrossAttention)]
        return [constant for module in folded for constant in (module.key, module.value)]

    assert len(constants()) == 2 * (3 + 1 + 4)
    backbone = model.to(torch.bfloat16).diffusion
    assert {constant.dtype for constant in (*constants(), backbone.null_prompt)} == {torch.bfloat16}
    assert {constant.dtype for constant in (backbone.mean, backbone.std)} == {torch.float32}  # what pixels are in
    model.to("meta")
    assert {constant.device.type for constant in constants()} == {"meta"}


def test_an_unfolded_model_has_the_published_weights_and_gives_the_same_features(model: SketchFusion) -> None:
    pixels, geometry = torch.rand(2, 3, 64, 64), [model.preprocess(torch.rand(3, 64, 64))[1]] * 2
    batch = (pixels, torch.utils.data.default_collate(geometry))
    model.enable_gradient_checkpointing()
    with torch.no_grad():
        folded = model(*batch)
        model.unfold()
        plain = model(*batch)
    assert relative_error(folded.dense, plain.dense) < 1e-5
    names = list(model.diffusion.unet.state_dict())
    assert any("time_embedding" in name for name in names)
    assert any("attn2.to_k" in name for name in names)
    assert model.diffusion.unet.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.diffusion.parameters())

    unet = model.diffusion.unet
    model.unfold()  # nothing left to do: what was trained since stays
    assert model.diffusion.unet is unet


# ---- the work saved at true size, one image of 512 px


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_work_that_no_longer_runs() -> None:
    """Stable Diffusion 2.1: figures of docs/concepts.md."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**published.SD21_UNET), AutoencoderKL(**published.SD_VAE)
        prompt, noised, pixels = torch.empty(77, 1024), torch.empty(1, 4, 64, 64), torch.empty(1, 3, 512, 512)
        maps = {"up0": torch.empty(1, 1280, 16, 16), "up1": torch.empty(1, 1280, 32, 32)}
        aggregator = Aggregator(dict.fromkeys(maps, 1280), 1280, 60, 32)

    def build(fold: bool) -> DiffusionBackbone:
        parts = [shared_copy(part) for part in (vae, unet)]
        return DiffusionBackbone(*parts, alpha_bar=0.8, null_prompt=prompt, taps=UPS[:3], fold=fold).to("meta")

    folded, plain = build(True), build(False)
    unets = [flops(lambda d=d: d(noised, {}, inject_skips=True)) for d in (plain, folded)]
    vaes = [flops(lambda: vae.encode(pixels)), flops(lambda: folded.encode(pixels))]
    late = flops(lambda: aggregator(maps))
    early = flops(
        lambda: [plain_bottleneck(b, m, 60) for b, m in zip(aggregator.taps.values(), maps.values(), strict=True)]
    )
    assert [round((before - after) / 1e9, 2) for before, after in (unets, vaes, (early, late))] == [3.69, 0.15, 4.85]
    weights = [sum(p.numel() for p in diffusion.unet.parameters()) for diffusion in (plain, folded)]
    assert round((weights[0] - weights[1]) / 1e6, 1) == 50.2
