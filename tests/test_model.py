"""What `encode` and `forward` promise, on the real classes at small widths."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from sketchfusion import ConfigError, Features, ImageError, SketchFusion, SketchFusionError, Strokes
from sketchfusion.images import Preprocess


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(i, 30 + 7 * i, 60 - 5 * i) for i in range(7)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def agree(a: Features, b: Features, tolerance: float = 1e-4) -> bool:
    return distance(a.pooled, b.pooled) < tolerance and distance(a.dense, b.dense) < tolerance


# ---- encode


def test_one_in_one_out_and_a_list_in_a_batch_out(model: SketchFusion) -> None:
    one, many = model.encode(PICTURES[0]), model.encode(PICTURES[:3])
    assert one.pooled.shape == (32,)
    assert one.dense.shape == (32, 12, 12)
    assert many.pooled.shape == (3, 32)
    assert many.dense.shape == (3, 32, 12, 12)
    assert agree(one, many[0])
    assert len(model.encode([PICTURES[0]])) == 1


def test_empty_in_empty_out(model: SketchFusion) -> None:
    empty = model.encode([])
    assert empty.pooled.shape == (0, 32)
    assert empty.dense.shape == (0, 32, 12, 12)
    assert len(empty) == 0
    assert list(model.stream(iter([]))) == []


def test_iterators_of_mixed_kinds_keep_their_order(model: SketchFusion, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PICTURES[1].save(path)
    array = np.asarray(PICTURES[2])
    tensor = torch.from_numpy(np.asarray(PICTURES[3])).permute(2, 0, 1)
    drawing = Strokes.from_quickdraw({"drawing": [[[0, 255], [0, 255]]]})
    mixed = [PICTURES[0], str(path), path, array, tensor, drawing, PICTURES[4]]
    features = model.encode((image for image in mixed), batch_size=3)
    for image, got in zip(mixed, features, strict=True):
        assert agree(model.encode(image), got)


def test_nchw_tensor_is_a_list(model: SketchFusion) -> None:
    batch = torch.rand(3, 3, 40, 30)
    assert agree(model.encode(batch), model.encode(list(batch)))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_features_do_not_depend_on_the_batch_size(model: SketchFusion, batch_size: int) -> None:
    assert agree(model.encode(PICTURES, batch_size=batch_size), model.encode(PICTURES, batch_size=3))


def test_features_do_not_depend_on_their_neighbours(model: SketchFusion) -> None:
    backwards = model.encode(PICTURES[::-1])
    forwards = model.encode(PICTURES)
    assert distance(backwards.pooled.flip(0), forwards.pooled) < 1e-4


def test_repeated_calls_are_identical_whatever_the_global_seed(model: SketchFusion) -> None:
    torch.manual_seed(5)
    first = model.encode(PICTURES[:2])
    torch.manual_seed(6)
    assert torch.equal(model.encode(PICTURES[:2]).dense, first.dense)


def test_another_process_gets_the_same(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint", include_backbones=True)
    PICTURES[0].save(tmp_path / "picture.png")
    reloaded = SketchFusion.from_pretrained(tmp_path / "checkpoint", dtype="float32", device="cpu")
    script = (
        "import sys, sketchfusion as s;"
        "m = s.SketchFusion.from_pretrained(sys.argv[1], dtype='float32', device='cpu');"
        "m.encode(sys.argv[2]).save(sys.argv[3])"
    )
    out = tmp_path / "features.safetensors"
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "picture.png"), str(out)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert agree(Features.load(out), reloaded.encode(PICTURES[0]), 1e-5)


def test_ensembles_average_antithetic_maps_and_encode_once(model: SketchFusion) -> None:
    calls, passes = {"vae": 0, "aggregator": 0}, list[int]()

    def counting(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    model.diffusion.vae.encoder.register_forward_hook(counting("vae"))
    model.diffusion.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    model.aggregator.register_forward_hook(counting("aggregator"))
    four = model.encode(PICTURES[0], ensemble=4)
    assert calls == {"vae": 1, "aggregator": 1}
    assert passes == [4]  # one image: its copies pass together
    model.encode(PICTURES[:3], ensemble=4)
    assert passes == [4, 6, 6]  # of eight at a time, two copies of three images
    assert distance(four.dense, model.encode(PICTURES[0]).dense) > 1e-3

    pixels, _ = model.preprocess(PICTURES[0])
    latents, tokens = model.embed(pixels[None])
    noised = [model.diffusion.add_noise(latents, member) for member in range(4)]
    clean = model.diffusion.alpha_bar**0.5 * latents
    assert torch.allclose(noised[0] + noised[1], 2 * clean, atol=1e-6)
    assert torch.allclose(noised[2] + noised[3], 2 * clean, atol=1e-6)
    assert not torch.allclose(noised[0], noised[2])
    hooks = model.adapters(tokens)
    maps = [model.diffusion(latent, hooks, inject_skips=True) for latent in noised]
    mean = {tap: torch.stack([m[tap] for m in maps]).mean(0) for tap in maps[0]}
    for tap, together in model.tap(latents, tokens, ensemble=4).items():
        assert distance(together, mean[tap]) < 1e-5
    assert distance(model.aggregator(mean)[0].detach(), four.dense) < 1e-5


def test_normalize(model: SketchFusion) -> None:
    features = model.encode(PICTURES[:2], normalize=True)
    plain = model.encode(PICTURES[:2])
    assert torch.allclose(features.pooled.norm(dim=1), torch.ones(2), atol=1e-5)
    norms, plain_norms = features.dense.norm(dim=1), plain.dense.norm(dim=1)
    assert torch.allclose(norms, (plain_norms > 0).float(), atol=1e-5)


def test_zero_stays_zero_when_normalised(model: SketchFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.aggregator, "forward", lambda maps: torch.zeros(1, 32, 12, 12))
    features = model.encode(PICTURES[0], normalize=True)
    assert torch.equal(features.pooled, torch.zeros(32))
    assert torch.equal(features.dense, torch.zeros(32, 12, 12))


def test_numpy_and_torch(model: SketchFusion) -> None:
    arrays = model.encode(PICTURES[:2], to="numpy")
    tensors = model.encode(PICTURES[:2])
    assert isinstance(arrays.pooled, np.ndarray)
    assert arrays.dense.dtype == np.float32
    assert np.allclose(arrays.dense, tensors.dense.numpy())


def test_only_what_was_asked_for(model: SketchFusion) -> None:
    assert model.encode(PICTURES[0], dense=False).dense is None
    assert model.encode(PICTURES[:2], pooled=False).pooled is None


def test_size_changes_the_canvas_and_nothing_else(model: SketchFusion) -> None:
    features = model.encode(PICTURES[0], size=104)  # 13 × 13 latents, which 8 does not divide
    assert features.dense.shape == (32, 12, 12)
    assert features.geometry.canvas == 104


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"size": 100}, "size"),
        ({"size": 0}, "size"),
        ({"ensemble": 3}, "ensemble"),
        ({"batch_size": 0}, "batch_size"),
        ({"to": "jax"}, "to"),
        ({"pooled": False, "dense": False}, "pooled"),
        ({"normalise": True}, "normalise"),
    ],
)
def test_illegal_arguments_name_the_legal_ones(model: SketchFusion, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.encode(PICTURES[0], **arguments)
    assert caught.value.key == key
    with pytest.raises(ConfigError):  # at the call, not at the first batch
        model.stream(PICTURES, **arguments)


def test_what_cannot_be_called_is_no_on_error(model: SketchFusion) -> None:
    with pytest.raises(ConfigError, match="on_error"):
        model.encode(PICTURES[:1], on_error="skip")  # type: ignore[arg-type]


def test_an_unknown_keyword_names_the_known_ones(model: SketchFusion) -> None:
    with pytest.raises(ConfigError, match=r"normalize.*ensemble"):
        model.encode([], normalise=True)


def test_results_are_ordinary_float32_tensors_on_which_a_head_trains(model: SketchFusion) -> None:
    features = model.to(torch.bfloat16).encode(PICTURES)
    assert features.pooled.dtype == features.dense.dtype == torch.float32
    assert not features.pooled.requires_grad
    head = torch.nn.Linear(32, 2)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(head(features.pooled), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_bad_image_is_named_and_the_good_ones_before_it_come_out(model: SketchFusion) -> None:
    images = [*PICTURES[:3], "missing.png", PICTURES[3]]
    with pytest.raises(ImageError, match=r"image 3.*missing\.png") as caught:
        model.encode(images, batch_size=2)
    assert caught.value.index == 3
    done = []
    with pytest.raises(ImageError):
        done.extend(model.stream(images, batch_size=2))
    stream = model.stream(images, batch_size=2)
    assert [len(next(stream)), len(next(stream))] == [2, 1]
    with pytest.raises(ImageError) as caught:
        model.encode("missing.png")
    assert caught.value.index is None


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_images_can_be_left_out(model: SketchFusion, batch_size: int, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    images: list[Any] = [PICTURES[0], tmp_path / "bad.png", PICTURES[1], PICTURES[2], np.zeros(3)]
    expected = model.encode(PICTURES[:3])
    for some in (images, iter(images)):
        errors: list[ImageError] = []
        features = model.encode(some, batch_size=batch_size, on_error=errors.append)
        assert agree(features, expected)
        assert [error.index for error in errors] == [1, 4]
        assert "bad.png" in str(errors[0])
    errors.clear()
    assert sum(len(part) for part in model.stream(images, batch_size=batch_size, on_error=errors.append)) == 3
    assert len(errors) == 2
    assert len(model.encode(images[1:2], on_error=errors.append)) == 0
    with pytest.raises(ImageError, match="bad"):  # a single image has nothing beside it
        model.encode(images[1], on_error=errors.append)


def test_files_are_read_ahead_and_what_is_in_memory_only_in_its_turn(model: SketchFusion, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path, picture in zip(paths, PICTURES, strict=True):
        picture.save(path)
    drawn: list[int] = []

    def drawing(images: list[Any]) -> Iterator[Any]:
        for i, image in enumerate(images):
            drawn.append(i)
            yield image

    expected = model.encode(PICTURES).pooled
    stream = model.stream(drawing(paths), batch_size=2)
    first = next(stream)
    assert drawn == [0, 1, 2, 3]  # one batch ahead, and no further
    assert torch.allclose(torch.cat([first.pooled, *(f.pooled for f in stream)]), expected, atol=1e-5)
    drawn.clear()
    buffer = Image.new("RGB", PICTURES[0].size)

    def frames() -> Iterator[Image.Image]:  # a camera: every frame is written into the same image
        for image in drawing(PICTURES):
            buffer.paste(image.resize(buffer.size))
            yield buffer

    stream = model.stream(frames(), batch_size=2)
    found = [next(stream).pooled]
    assert drawn == [0, 1]
    found += [features.pooled for features in stream]
    separate = model.encode([image.resize(buffer.size) for image in PICTURES]).pooled
    assert torch.allclose(torch.cat(found), separate, atol=1e-5)


def test_a_stream_that_is_left_leaves_no_threads(model: SketchFusion, tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "0.png")
    stream = model.stream([tmp_path / "0.png"] * 9, batch_size=1)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sketchfusion-reader")]


OUT_OF_MEMORY = [torch.OutOfMemoryError("simulated"), torch.AcceleratorError("CUDA error: out of memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_goes_on(
    model: SketchFusion, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    sizes = []
    forward = model.diffusion.forward

    def cramped(latents: torch.Tensor, *arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise error
        return forward(latents, *arguments, **keywords)

    expected, one = model.encode(PICTURES), model.encode(PICTURES[0], ensemble=8)
    monkeypatch.setattr(model.diffusion, "forward", cramped)
    assert agree(model.encode(PICTURES, batch_size=7), expected)
    assert sizes == [7, 4, 2, 2, 2, 1]
    sizes.clear()
    assert agree(model.encode(PICTURES[:1], ensemble=8)[0], one)  # the copies of one image are a batch, too
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_out_of_memory_for_one_image_is_one_clear_error(model: SketchFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Features:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model.diffusion, "forward", full)
    with pytest.raises(SketchFusionError, match="out of memory"):
        model.encode(PICTURES[:2])


def test_another_error_is_not_taken_for_it(model: SketchFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Features:
        raise RuntimeError("something else")

    monkeypatch.setattr(model.diffusion, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        model.encode(PICTURES[:2])


def test_features_that_overflow_are_refused(model: SketchFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.aggregator, "forward", lambda maps: torch.full((1, 32, 12, 12), torch.inf))
    with pytest.raises(SketchFusionError, match="not finite"):
        model.encode(PICTURES[0])


def test_progress_on_request(model: SketchFusion, capsys: pytest.CaptureFixture[str]) -> None:
    model.encode(PICTURES[:2], progress=True)
    assert "2/2" in capsys.readouterr().err
    model.encode(PICTURES[:2])  # stderr is no terminal here
    assert capsys.readouterr().err == ""


def test_padding_does_not_reach_the_pooled_vector(model: SketchFusion) -> None:
    _, geometry = model.preprocess(picture(0, 64, 16))
    assert (geometry.left, geometry.inner_height) == (0, 16)
    features = model.encode(picture(0, 64, 16))
    mask = geometry.mask(12)
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(features.pooled, features.dense[:, mask].amax(dim=1))
    outside = features.dense[:, ~mask].amax(dim=1)
    assert (outside > features.pooled).any()  # otherwise this test says nothing


# ---- the trainable forward


def batch(model: SketchFusion) -> Any:
    return next(iter(DataLoader(PICTURES[:2], batch_size=2, collate_fn=lambda x: collated(model, x))))


def collated(model: SketchFusion, images: list[Any]) -> Any:
    return torch.utils.data.default_collate([model.preprocess(image) for image in images])


@pytest.mark.parametrize("output", ["pooled", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_and_no_backbone(
    untrained: SketchFusion, output: str, checkpointing: bool
) -> None:
    """From zero adapters on: the released script detaches the UNet's features, so that its adapters never learn."""
    if checkpointing:
        untrained.enable_gradient_checkpointing()
    features = untrained.train()(*batch(untrained))
    getattr(features, output).square().sum().backward()
    for site, adapter in untrained.adapters.sites.items():
        for parameter in adapter.parameters():
            assert parameter.grad is not None, site
            assert parameter.grad.abs().sum() > 0, site
    for name, parameter in untrained.aggregator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for backbone in (untrained.diffusion, untrained.semantic):
        assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def test_training_mode_never_reaches_a_backbone(model: SketchFusion) -> None:
    model.train()
    assert model.training
    assert model.aggregator.training
    for backbone in (model.diffusion, model.semantic):
        assert not any(module.training for module in backbone.modules())


def test_forward_and_encode_are_one_computation(model: SketchFusion) -> None:
    features = model(*batch(model))
    assert features.pooled.requires_grad
    assert agree(features, model.encode(PICTURES[:2]), 1e-5)


class Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, preprocess: Any):
        self.preprocess = preprocess

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.preprocess(PICTURES[index])


def test_a_dataloader_with_workers_feeds_forward(model: SketchFusion) -> None:
    loader = DataLoader(Pictures(model.preprocess), batch_size=3, num_workers=2, multiprocessing_context="spawn")
    pooled = torch.cat([model(*items).pooled.detach() for items in loader])
    assert distance(pooled, model.encode(PICTURES[:6]).pooled) < 1e-4


def test_trainable_parameters_are_adapters_and_aggregator(model: SketchFusion) -> None:
    ours = {id(p) for p in model.trainable_parameters()}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    assert ours == {id(p) for part in (model.adapters, model.aggregator) for p in part.parameters()}


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(untrained: SketchFusion) -> None:
    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            untrained(*batch(untrained))
        return sum(sizes)

    everything = kept()
    untrained.enable_gradient_checkpointing()
    assert kept() < 0.8 * everything


def test_one_step_changes_the_features(untrained: SketchFusion) -> None:
    before = untrained(*batch(untrained)).pooled.detach()
    optimiser = torch.optim.SGD(untrained.trainable_parameters(), lr=0.1)
    untrained(*batch(untrained)).pooled.square().sum().backward()
    optimiser.step()
    assert distance(untrained(*batch(untrained)).pooled, before) > 1e-4


def test_forward_refuses_other_shapes(model: SketchFusion) -> None:
    pixels, geometry = batch(model)
    with pytest.raises(ConfigError, match="N, 3, S, S"):
        model(pixels[0], geometry)
    for other in (collated(model, PICTURES[:1])[1], model.preprocess(PICTURES[0])[1], None):
        with pytest.raises(ConfigError, match="2 images"):
            model(pixels, other)
    for wrong in ((255 * pixels).byte(), pixels.half(), pixels.numpy()):
        with pytest.raises(ConfigError, match="float32 in"):
            model(wrong, geometry)


def test_features_say_where_they_are_from(model: SketchFusion, tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        Image.new("RGB", (20 + i, 20), "red").save(name)
    Path(names[3]).write_text("no image")
    left = [*names[:3], names[4]]
    options: dict[str, Any] = {"batch_size": 2, "on_error": lambda error: None, "dense": False}
    assert model.encode(Path(names[0])).paths == names[:1]
    assert model.encode(names, **options).paths == left
    assert model.encode(iter(names), **options).paths == left
    assert [part.paths for part in model.stream(names, **options)] == [left[:2], left[2:]]
    assert model.encode([names[0], Image.open(names[1])]).paths is None  # not all are known
    assert model.encode([]).paths is None


def test_a_callers_inference_mode_gives_ordinary_tensors(model: SketchFusion) -> None:
    with torch.inference_mode():
        one, many = model.encode(PICTURES[0]), model.encode(PICTURES[:2])
    assert not one.pooled.is_inference()
    assert not many.dense.is_inference()


def test_only_what_describes_the_training_can_be_replaced_in_the_configuration(model: SketchFusion) -> None:
    model.config = dataclasses.replace(model.config, task="retrieval", ensemble=2)
    with pytest.raises(ConfigError, match="built into the model"):
        model.config = dataclasses.replace(model.config, timestep=3)
    assert (model.config.task, model.config.timestep) == ("retrieval", 195)


def test_metrics_are_numbers_of_whatever_kind(model: SketchFusion, tmp_path: Path) -> None:
    model.config = dataclasses.replace(model.config, metrics={"acc": np.float32(0.5)})  # type: ignore[dict-item]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["metrics"] == {"acc": 0.5}
    for wrong in ("0.5", torch.tensor(0.5), True, None):
        with pytest.raises(ConfigError, match=r"metrics\.acc"):
            dataclasses.replace(model.config, metrics={"acc": wrong})  # type: ignore[dict-item]


# ---- state


def test_untrained_models_begin_as_plain_diffusion_features_and_warn_once(untrained: SketchFusion) -> None:
    pixels, _ = Preprocess(128)(PICTURES[0])  # a map of one cell is in both layouts, and rounds as either
    latents, tokens = untrained.embed(pixels[None])
    noised = untrained.diffusion.add_noise(latents, 0)
    plain = untrained.diffusion(noised, {}, inject_skips=True)
    injected = untrained.diffusion(noised, untrained.adapters(tokens), inject_skips=True)
    assert all(torch.equal(plain[tap], injected[tap]) for tap in plain)
    with pytest.warns(UserWarning, match="UNTRAINED"):
        untrained.encode(PICTURES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained.encode(PICTURES[0])


def test_features_name_their_model_by_what_they_depend_on(model: SketchFusion, tmp_path: Path) -> None:
    first = model.fingerprint
    assert model.encode(PICTURES[0]).model == model.encode(PICTURES[:2]).model == model.encode([]).model == first
    assert {part.model for part in model.stream(PICTURES[:3], batch_size=2)} == {first}
    model.save_pretrained(tmp_path, include_backbones=True)
    with torch.inference_mode():
        loaded = SketchFusion.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
        loaded.config = dataclasses.replace(loaded.config, task="another", ensemble=2)
        assert loaded.fingerprint == first
        loaded.aggregator.mixing_weights.add_(1)
        assert loaded.fingerprint != first
        loaded.aggregator.mixing_weights.sub_(1)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"timestep": 195', '"timestep": 196'))
    later = SketchFusion.from_pretrained(tmp_path, device="cpu")
    assert len({first, loaded.fingerprint, later.fingerprint}) == 2
    for fused in (False, True):
        optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=0.1, fused=fused)
        model(*batch(model)).pooled.square().sum().backward()
        before = model.fingerprint
        optimiser.step()
        assert model.encode(PICTURES[0]).model == model.fingerprint != before


def test_reset_forgets_what_was_trained_and_what_it_was_for(model: SketchFusion) -> None:
    model.config = dataclasses.replace(model.config, task="retrieval", training_data="seen", metrics={"mAP": 0.5})
    before = [parameter.clone() for parameter in model.trainable_parameters()]
    model.reset()
    assert not any(parameter.any() for parameter in model.adapters.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.trainable_parameters(), strict=True))
    assert (model.config.task, model.config.metrics, model.config.training_data) == (None, {}, "seen")
    with pytest.warns(UserWarning, match="UNTRAINED"):
        model.encode(torch.rand(3, 8, 8))


def test_to_moves_everything_and_what_is_trained_stays_float32(model: SketchFusion) -> None:
    before = [p.clone() for p in model.trainable_parameters()]
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before, model.trainable_parameters(), strict=True))
    assert model.encode(PICTURES[0]).dense.isfinite().all()
    model.float()
    assert model.dtype == torch.float32
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"meta"}


def test_bfloat16_is_close_to_float32(model: SketchFusion) -> None:
    exact = model.encode(PICTURES).pooled
    rough = model.to(torch.bfloat16).encode(PICTURES).pooled
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.99
    assert not torch.equal(exact, rough)


def test_float16_on_a_cpu_warns(backbones: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="float16 on a CPU"):
        SketchFusion.from_backbones(**backbones, device="cpu", dtype="float16", aggregator_width=32)


@pytest.mark.parametrize(("width", "groups"), [(32, 4), (24, 2), (20, 1)])
def test_any_width_of_the_aggregator_has_groups(backbones: dict[str, Path], width: int, groups: int) -> None:
    """As many as the UNet's norms have, or as divide its inner width, a quarter of it."""
    model = SketchFusion.from_backbones(**backbones, device="cpu", dtype="float32", aggregator_width=width)
    assert model.config.aggregator_groups == groups


def test_what_never_runs_is_gone(model: SketchFusion) -> None:
    names = [name for name, _ in model.diffusion.named_parameters()]
    assert not [name for name in names if "decoder" in name or "post_quant" in name]
    assert not [name for name in names if "up_blocks.3" in name or name.startswith("unet.conv_out")]
    assert [name for name in names if "up_blocks.2" in name]


def test_what_never_runs_is_not_even_read(backbones: dict[str, Path], built: SketchFusion, tmp_path: Path) -> None:
    shutil.copytree(backbones["diffusion"], tmp_path / "diffusion")
    never = ("decoder.", "post_quant_conv.", "up_blocks.3.", "conv_norm_out.", "conv_out.")
    dropped = 0
    for part in ("vae", "unet"):
        path = tmp_path / "diffusion" / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(never)}
        dropped += len(weights) - len(kept)
        save_file(kept, path, metadata={"format": "pt"})
    assert dropped > 100
    torch.manual_seed(2)  # as for `built`
    model = SketchFusion.from_backbones(
        tmp_path / "diffusion", backbones["semantic"], dtype="float32", device="cpu",
        aggregator_width=32, aggregator_grid=12,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="UNTRAINED"):
        assert agree(model.encode(PICTURES[0]), built.encode(PICTURES[0]))


# ---- memory

MEMORY = """
import resource, sys, numpy as np
from PIL import Image
from sketchfusion import SketchFusion
model = SketchFusion.from_pretrained(sys.argv[1], dtype="float32", device="cpu")
images = lambda n: (Image.new("RGB", (40 + 13 * (i % 50), 600 - 7 * (i % 50)), (i % 256, 9, 9)) for i in range(n))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for _ in model.stream(images(50)): pass
model.encode(images(50), dense=False)
before = peak()
for _ in model.stream(images(500)): pass
streamed = peak()
model.encode(images(500), dense=False)
print(streamed - before, peak() - streamed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_number_of_images(backbones: dict[str, Path], tmp_path: Path) -> None:
    settings = {"aggregator_width": 32, "aggregator_grid": 24}
    SketchFusion.from_backbones(**backbones, device="cpu", **settings).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # A batch of the default 8 takes 0.5 MB for its pixels and features; keeping all would take 450 × 74 kB = 33 MB.
    assert max(map(int, out.split())) < 12e6, out
