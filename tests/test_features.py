"""Features: batches, sampling, saving."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sketchfusion.errors import LoadError, SketchFusionError
from sketchfusion.features import Features
from sketchfusion.images import Geometry, Preprocess, collate, letterbox

pytestmark = pytest.mark.filterwarnings("error")

SIZES = [(100, 50), (30, 90), (64, 64)]


def batch(dtype: torch.dtype = torch.float32, count: int = 3) -> Features:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(count, 5, generator=generator).to(dtype)
    dense = torch.randn(count, 5, 6, 6, generator=generator).to(dtype)
    return Features(pooled, dense, collate([letterbox(*size, 64) for size in SIZES[:count]]))


def coordinate_map(side: int) -> torch.Tensor:
    """(2, side, side): each cell's own centre on the canvas, x then y."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])


def same(a: Features, b: Features) -> None:
    for x, y in ((a.pooled, b.pooled), (a.dense, b.dense)):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a.geometry, b.geometry, strict=True))
    assert isinstance(a.geometry.width, int) == isinstance(b.geometry.width, int)
    assert (a.paths, a.model) == (b.paths, b.model)


# A batch is a sequence


def test_indexing_gives_single_images() -> None:
    features = batch()
    assert len(features) == 3
    for i in (0, 2, -1, -3, np.int64(1)):
        one = features[i]
        assert torch.equal(one.pooled, features.pooled[i])
        assert torch.equal(one.dense, features.dense[i])
        assert one.geometry == letterbox(*SIZES[i], 64)
        assert all(type(field) is int for field in one.geometry)
        with pytest.raises(TypeError, match="single image"):
            len(one)
    for i in (3, -4):
        with pytest.raises(IndexError):
            features[i]
    assert [one.geometry[:2] for one in features] == SIZES


@pytest.mark.parametrize(
    "index", [slice(1, 3), slice(None, None, 2), slice(5, 9), slice(None, None, -1), slice(-1, None)]
)
def test_slices_are_batches(index: slice) -> None:
    features = batch()
    features.paths = ["a", "b", "c"]
    for found in (features[index], features.numpy()[index]):
        expected = [0, 1, 2][index]
        assert len(found) == len(expected)
        assert found.dense.shape == (len(expected), 5, 6, 6)
        assert found.paths == ["abc"[i] for i in expected]
        assert [one.geometry[:2] for one in found] == [SIZES[i] for i in expected]


@pytest.mark.parametrize("rows", [[2, 0], (2, -3), np.array([2, 0]), torch.tensor([2, 0]), [True, False, True], []])
def test_chosen_rows_are_a_batch(rows: Any) -> None:
    features = batch()
    features.paths = ["a", "b", "c"]
    expected = [0, 2] if True in rows else [2, 0][: len(rows)]
    for found in (features[rows], features.numpy()[rows]):
        assert found.paths == ["abc"[i] for i in expected]
        assert torch.equal(torch.as_tensor(found.pooled), features.pooled[expected])
        assert torch.equal(torch.as_tensor(found.dense), features.dense[expected])
        assert [one.geometry[:2] for one in found] == [SIZES[i] for i in expected]


@pytest.mark.parametrize("rows", [[3], [-4], [True, False], [[0, 1]], ["a"], [0.5]])
def test_rows_that_are_not_there(rows: Any) -> None:
    with pytest.raises((IndexError, TypeError)):
        batch()[rows]


def test_what_was_not_asked_for_is_none() -> None:
    features = batch()
    features.dense = None
    assert features[0].dense is None
    assert features[1:].to(torch.float64).numpy().dense is None
    with pytest.raises(SketchFusionError, match="dense=True"):
        features.at([[1, 1]])


def test_repr_shows_shapes() -> None:
    assert repr(batch()) == (
        "Features(a batch of 3; pooled: tensor(3, 5) float32, cpu; dense: tensor(3, 5, 6, 6) float32, cpu)"
    )
    one = batch(torch.bfloat16)[0]
    one.dense = None
    assert repr(one.numpy()) == "Features(one image of 100 x 50 on 64; pooled: array(5,) float32; dense: None)"


# Moving


def test_to_has_the_semantics_of_torch() -> None:
    features = batch()
    for arguments in ((torch.float16,), ("cpu", torch.float16), (torch.zeros(1, dtype=torch.float16),)):
        moved = features.to(*arguments)
        assert moved.pooled.dtype == moved.dense.dtype == torch.float16
        assert moved.geometry.width.dtype == torch.int64
    assert features.pooled.dtype == torch.float32
    assert features.to(device="meta").geometry.width.device.type == "meta"
    assert isinstance(features.numpy().to("cpu").pooled, torch.Tensor)
    assert isinstance(features[0].to("cpu").geometry.width, int)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numpy(dtype: torch.dtype) -> None:
    features = batch(dtype)
    features.pooled.requires_grad_()
    arrays = features.numpy()
    assert isinstance(arrays.pooled, np.ndarray)
    assert isinstance(arrays.dense, np.ndarray)
    assert np.array_equal(arrays.dense.astype(np.float32), features.dense.float().numpy())
    assert arrays[0].pooled.shape == (5,)


# Sampling


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_at_finds_the_place_on_the_canvas(width: int, height: int, u: float, v: float) -> None:
    """Where the map holds each cell's own place, sampling it returns the place of the point."""
    geometry, side = letterbox(width, height, 64), 16
    point = torch.tensor([[u * width, v * height]], dtype=torch.float64)
    found = Features(None, coordinate_map(side), geometry).at(point)[0]
    expected = geometry.to_canvas(point)[0].clamp(0.5 / side, 1 - 0.5 / side)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (8, 200)])
def test_at_agrees_with_the_pixels(size: tuple[int, int]) -> None:
    """A dot painted on the image, letterboxed, is where `at` looks for it: nothing of Geometry is used."""
    width, height = size
    column, row = int(width * 0.7), int(height * 0.3)
    image = np.full((height, width), 255, np.uint8)
    image[row, column] = 0
    pixels, geometry = Preprocess(240)(image)
    dark = (1 - pixels[0]).double().clamp(min=0)
    dark = dark * (dark > 0.3 * dark.max())
    centre = (coordinate_map(240) * dark).sum((1, 2)) / dark.sum()
    found = Features(None, coordinate_map(240), geometry).at([[column + 0.5, row + 0.5]])[0]
    torch.testing.assert_close(found, centre, rtol=0, atol=1.5 / 240)
    off = Features(None, coordinate_map(240), geometry).at([[column + 1.5, row + 0.5]])[0]
    if width > 50:
        assert (off - centre).abs().max() > 0.5 / max(size)


def test_at_for_batches() -> None:
    features = batch(torch.float64)
    inside = torch.rand(3, 7, 2, dtype=torch.float64) * 30
    each = features.at(inside)
    assert each.shape == (3, 7, 5)
    for i in range(3):
        torch.testing.assert_close(each[i], features[i].at(inside[i]))
    shared = features.at(inside[0])
    torch.testing.assert_close(shared[2], features[2].at(inside[0]))
    for kind in (inside.numpy(), inside.tolist(), np.frombuffer(inside.numpy().tobytes()).reshape(3, 7, 2)):
        torch.testing.assert_close(features.at(kind), each)
    arrays = features.numpy().at(inside)
    assert isinstance(arrays, np.ndarray)
    assert np.allclose(arrays, each)
    assert isinstance(features.numpy()[0].at([[3, 4]]), np.ndarray)
    assert features.at(torch.zeros(0, 2)).shape == (3, 0, 5)
    assert features[0].at(np.zeros((0, 2))).shape == (0, 5)


def test_at_interpolates_between_cells() -> None:
    geometry = Geometry(4, 4, 0, 0, 8, 8, 8)
    dense = torch.arange(16.0).reshape(1, 4, 4)
    features = Features(None, dense, geometry)
    points = [[0.5, 0.5], [1.5, 0.5], [1, 0.5], [0.5, 1], [4, 4], [0, 0], [2, 2]]
    assert features.at(points)[:, 0].tolist() == pytest.approx([0, 1, 0.5, 2, 15, 0, 7.5])
    wrong = Features(None, dense.numpy()[:, ::-1], geometry)  # negative strides
    assert wrong.at([[0.5, 0.5]]).tolist() == [[12.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_at_in_half_precision(dtype: torch.dtype) -> None:
    """The map is half precise, the place in it is not: half floats cannot tell a large image's pixels apart."""
    geometry, points = letterbox(3000, 2000, 512), [[1234.5, 567.5], [2999.0, 1.0], [2001.5, 1998.5]]
    coarse = Features(None, 1000 * coordinate_map(60).to(dtype), geometry)
    found = coarse.at(points)
    assert found.dtype == dtype
    assert torch.equal(found, coarse.to(torch.float32).at(points).to(dtype))


def test_gradients_flow_through_at() -> None:
    features = batch()
    features.dense.requires_grad_()
    features.at([[10.0, 10.0]]).sum().backward()
    assert features.dense.grad is not None
    assert features.dense.grad.sum() == pytest.approx(15)  # the weights of each sample sum to one


@pytest.mark.parametrize("point", [(-0.01, 5), (5, 50.1), (100.5, 5), (float("nan"), 5), (float("inf"), 5)])
def test_points_outside_the_image_raise(point: tuple[float, float]) -> None:
    features = batch()
    with pytest.raises(SketchFusionError, match=r"point 1 .* outside the image of 100 x 50") as caught:
        features[0].at([[1, 1], point])
    assert f"({point[0]:g}, {point[1]:g})" in str(caught.value)
    with pytest.raises(SketchFusionError, match=r"point 0 .* outside image 0 of 100 x 50"):
        features.at([point])
    with pytest.raises(SketchFusionError, match=r"point 1 \(31, 20\) .* outside image 1 of 30 x 90"):
        features.at([[1, 1], [31, 20]])
    features[0].at([[0, 0], [100, 50]])


@pytest.mark.parametrize("points", [[1, 2], [[1, 2, 3]], [[[1, 2]]] * 2, 5, [[1], [2, 3]], "ab", None])
def test_points_of_another_shape_raise(points: Any) -> None:
    with pytest.raises(SketchFusionError, match="points"):
        batch().at(points)
    with pytest.raises(SketchFusionError, match="points"):
        batch()[0].at([[[1, 2]]])


def test_the_empty_batch(tmp_path: Path) -> None:
    empty = Features(torch.zeros(0, 5), torch.zeros(0, 5, 6, 6), collate([]))
    assert len(empty) == 0
    assert list(empty) == []
    assert len(empty[:2]) == 0
    assert empty.at([[1, 1]]).shape == (0, 1, 5)
    assert "a batch of 0" in repr(empty)
    empty.save(tmp_path / "empty.safetensors", paths=[])
    same(Features.load(tmp_path / "empty.safetensors"), Features(empty.pooled, empty.dense, empty.geometry, []))


def test_batches_are_put_together() -> None:
    features = replace(batch(), paths=["a", "b", "c"], model="m")
    same(Features.cat([features[:1], features[1], features[2:]]), features)
    same(Features.cat([features[2:].numpy()]).to("cpu"), features[2:])
    assert isinstance(Features.cat([features[:1].numpy(), features[1:].numpy()]).pooled, np.ndarray)
    pooled = [replace(part, dense=None) for part in (features[0], features[1:])]
    same(Features.cat(iter(pooled)), replace(features, dense=None))
    unknown = Features.cat([replace(features, model=None), features, replace(features, paths=None)])
    assert (len(unknown), unknown.model, unknown.paths) == (9, None, None)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"model": "n"}, "the models m and n"),
        ({"dense": None}, "some of these features have dense"),
        ({"pooled": torch.zeros(3, 4)}, "pooled features do not fit together"),
    ],
)
def test_what_is_no_one_batch(other: dict[str, Any], problem: str) -> None:
    features = replace(batch(), model="m")
    with pytest.raises(SketchFusionError, match=problem):
        Features.cat([features, replace(features, **other)])
    with pytest.raises(SketchFusionError, match="no features"):
        Features.cat([])


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "features.safetensors"
    features = batch(dtype)
    for kind in (features, features[1], features[::2], features[1:]):
        kind.save(file)
        same(Features.load(file), kind)
        same(Features.load(str(file)), kind)
    pooled = Features(features.pooled, None, features.geometry)
    features.save(file)
    same(Features.load(file, dense=False), pooled)
    pooled.save(file)
    same(Features.load(file), pooled)
    transposed = Features(None, features.dense.transpose(2, 3), features.geometry)
    transposed.save(file)
    same(Features.load(file), transposed)
    assert os.listdir(tmp_path) == ["features.safetensors"]


@pytest.mark.parametrize("path", ["file/features", "a\0b", 250 * "a"])
def test_where_nothing_can_be_written(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SketchFusionError, match="cannot be written"):
        batch().save(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_a_saved_file(tmp_path: Path) -> None:
    batch().save(tmp_path / "features.safetensors")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert (tmp_path / "features.safetensors").stat().st_mode == ordinary.stat().st_mode


def test_arrays_are_saved_too(tmp_path: Path) -> None:
    batch().numpy().save(tmp_path / "f")
    same(Features.load(tmp_path / "f"), batch())


def test_paths_are_saved_with_the_features(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    batch().save(file, paths=["a.png", "ä b.png", Path("c.png")])  # type: ignore[list-item]
    loaded = Features.load(file)
    assert loaded.paths == ["a.png", "ä b.png", "c.png"]
    assert loaded[-1].paths == ["c.png"]
    loaded[1:].save(file)
    assert Features.load(file).paths == ["ä b.png", "c.png"]
    with pytest.raises(SketchFusionError, match="2 paths for the features of 3 images"):
        batch().save(file, paths=["a", "b"])
    assert json.loads(load_file(file)["paths"].numpy().tobytes()) == ["ä b.png", "c.png"]


def test_paths_have_no_limit(tmp_path: Path) -> None:
    """A safetensors header, which also holds the metadata, takes 100 MB."""
    paths = ["/".join(["x" * 200] * 200) + str(i) for i in range(2600)]
    file = tmp_path / "f.safetensors"
    fields = torch.ones(len(Geometry._fields), len(paths), dtype=torch.int64)
    Features(torch.zeros(len(paths), 1), None, Geometry(*fields), paths).save(file)
    assert file.stat().st_size > 1e8
    assert Features.load(file).paths == paths


def test_one_file_is_saved_by_several_threads(tmp_path: Path) -> None:
    file, features = tmp_path / "f.safetensors", batch()

    def save(_: int) -> bool:
        features.save(file)
        return len(Features.load(file)) == len(features)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(save, range(200)))
    assert os.listdir(tmp_path) == ["f.safetensors"]


def test_a_batch_without_images_takes_no_paths_from_others() -> None:
    named, empty = replace(batch(), paths=["a", "b", "c"]), batch()[:0]
    assert empty.paths is None
    assert not empty
    assert batch()[0]
    assert Features.cat([named, empty]).paths == ["a", "b", "c"]
    assert Features.cat([named, batch()]).paths is None


def test_the_model_stays_with_its_features(tmp_path: Path) -> None:
    features = replace(batch(), model="0123456789abcdef")
    parts = (features[0], features[1:], features.numpy(), features.to(torch.float16))
    assert {part.model for part in parts} == {features.model}
    features.save(tmp_path / "f")
    same(Features.load(tmp_path / "f"), features)


def test_others_can_read_the_file(tmp_path: Path) -> None:
    batch().save(tmp_path / "f.safetensors")
    tensors = load_file(tmp_path / "f.safetensors")
    assert torch.equal(tensors["dense"], batch().dense)
    assert tensors["geometry.width"].tolist() == [100, 30, 64]


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.safetensors"
    batch().save(file)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SketchFusionError, match="No space left"):
        batch(count=2).save(file)
    assert len(Features.load(file)) == 3
    assert os.listdir(tmp_path) == ["f.safetensors"]
    with pytest.raises(SketchFusionError, match="none"):
        batch().save(tmp_path / "none" / "f.safetensors")


def test_saving_over_a_file_that_is_being_read(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    batch().save(file)
    failures: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(30):
                same(Features.load(file), batch())
        except Exception as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        batch().save(file)
    reader.join()
    assert not failures


def test_files_that_are_not_features(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    batch().save(good, paths=["a", "b", "c"])
    whole = good.read_bytes()
    tensors = load_file(good)
    metadata = {"format": "sketchfusion.features.1"}
    foreign = tmp_path / "foreign.safetensors"

    def refused(message: str = "") -> None:
        with pytest.raises(LoadError, match=message) as caught:
            Features.load(foreign)
        assert str(foreign) in str(caught.value)

    for contents in (b"", b"no safetensors", whole[:50], whole[:-10], b"\x80\x04N." + bytes(100), b"{" + whole[1:]):
        foreign.write_bytes(contents)
        refused("cannot be read")
    save_file({"x": torch.zeros(2)}, foreign)
    refused("not a file that Features.save wrote")
    save_file(tensors, foreign, {"format": "pt"})
    refused("format is 'pt'")
    for name in ("geometry.left", "geometry.canvas"):
        save_file({k: v for k, v in tensors.items() if k != name}, foreign, metadata)
        refused(name)
    for change in (
        {"pooled": torch.zeros(2, 5)},
        {"pooled": torch.zeros(3)},
        {"dense": torch.zeros(3, 5, 6)},
        {"geometry.top": torch.zeros(2, dtype=torch.int64)},
        {"geometry.top": torch.zeros(3)},
        {"denze": torch.zeros(3)},
    ):
        save_file(tensors | change, foreign, metadata)
        refused("do not fit")
    for paths in (b"[", b"3", b'["a"]'):
        save_file(tensors | {"paths": torch.tensor(list(paths), dtype=torch.uint8)}, foreign, metadata)
        refused("not a file that Features.save wrote")
    foreign.unlink()
    refused("cannot be read")
    foreign.mkdir()
    refused("cannot be read")
