"""Whatever a user has -> RGB on white -> tensor; the letterbox and its inverse."""

import contextlib
import io
import os
import pickle
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from sketchfusion import images
from sketchfusion.errors import ConfigError, ImageError
from sketchfusion.images import Geometry, Preprocess, as_stream, collate, letterbox, open_image, read_ahead
from sketchfusion.strokes import Strokes

pytestmark = pytest.mark.filterwarnings("error")

sides = st.integers(1, 5000)
canvases = st.integers(1, 96).map(lambda n: 8 * n)


def picture(width: int = 40, height: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Any) -> np.ndarray:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened)


# Geometry


@settings(max_examples=80, deadline=None)
@given(sides, sides, canvases, st.integers(1, 70))
def test_the_letterbox_inverts_and_always_counts_a_cell(width: int, height: int, canvas: int, grid: int) -> None:
    geometry = letterbox(width, height, canvas)
    points = torch.tensor([[0, 0], [0.5, 0.5], [width / 3, height / 7], [width, height]], dtype=torch.float64)
    on_canvas = geometry.to_canvas(points)
    torch.testing.assert_close(geometry.to_original(on_canvas), points, rtol=0, atol=1e-6)
    assert on_canvas.min() >= 0
    assert on_canvas.max() <= 1 + 1e-12
    assert max(geometry.inner_width, geometry.inner_height) == canvas
    assert min(geometry.inner_width, geometry.inner_height) >= 1

    mask = geometry.mask(grid)
    assert mask.shape == (grid, grid)
    assert mask.dtype == torch.bool
    assert mask.any()
    if (canvas - geometry.inner_width) % 2 == 0 and (canvas - geometry.inner_height) % 2 == 0:
        assert torch.equal(mask, mask.flip(0))
        assert torch.equal(mask, mask.flip(1))


@settings(max_examples=40, deadline=None)
@given(sides, sides, canvases)
def test_the_aspect_ratio_is_kept_to_half_a_pixel(width: int, height: int, canvas: int) -> None:
    geometry = letterbox(width, height, canvas)
    scale = canvas / max(width, height)
    for inner, side in ((geometry.inner_width, width), (geometry.inner_height, height)):
        assert abs(inner - max(1, side * scale)) <= 0.5 + 1e-9
    assert geometry.left == (canvas - geometry.inner_width) // 2
    assert geometry.top == (canvas - geometry.inner_height) // 2


def test_mask_counts_the_cells_whose_centre_lies_on_the_image() -> None:
    # 100 x 50 on 64: rows 16 to 48. With a grid of 4 the centres lie at 8, 24, 40, 56.
    expected = torch.tensor([False, True, True, False])
    assert torch.equal(letterbox(100, 50, 64).mask(4), expected[:, None].expand(4, 4))
    # A hair's breadth, off all the centres: the cells around the image's middle count.
    thin = Geometry(1, 1000, 31, 0, 1, 64, 64).mask(4)
    assert thin.any(0).tolist() == [False, True, False, False]
    assert thin.any(1).all()


def test_a_batch_agrees_with_its_images() -> None:
    singles = [letterbox(100, 50, 64), letterbox(3, 1000, 64), letterbox(64, 64, 64)]
    batch = collate(singles)
    assert all(field.shape == (3,) and field.dtype == torch.int64 for field in batch)
    assert [batch.image(i) for i in range(3)] == singles
    assert all(type(field) is int for field in batch.image(1))
    assert torch.equal(batch.mask(8), torch.stack([single.mask(8) for single in singles]))
    points = torch.rand(3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(
        batch.to_canvas(points), torch.stack([s.to_canvas(p) for s, p in zip(singles, points, strict=True)])
    )
    torch.testing.assert_close(batch.to_canvas(points[0]), torch.stack([s.to_canvas(points[0]) for s in singles]))
    torch.testing.assert_close(batch.to_original(batch.to_canvas(points)), points)


def test_a_geometry_lies_in_host_memory_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert all(field.device.type == "cpu" for field in collate([letterbox(100, 50, 64)]))


def test_an_empty_batch_has_a_geometry() -> None:
    empty = collate([])
    assert all(field.shape == (0,) and field.dtype == torch.int64 for field in empty)
    assert empty.mask(5).shape == (0, 5, 5)
    assert empty.to_canvas(torch.zeros(4, 2)).shape == (0, 4, 2)


def test_points_keep_their_float_type() -> None:
    geometry = letterbox(100, 50, 64)
    assert geometry.to_canvas(torch.zeros(1, 2)).dtype == torch.float32
    assert geometry.to_canvas(torch.tensor([[100, 50]])).tolist() == [[1.0, 0.75]]


# Preprocess


class Listed(torch.utils.data.Dataset):
    def __init__(self, items: list[Any], preprocess: Preprocess):
        self.items, self.preprocess = items, preprocess

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Geometry]:
        return self.preprocess(self.items[i])


def test_reading_in_threads_leaves_other_warnings_alone(tmp_path: Path) -> None:
    for i in range(24):
        Image.new("RGB", (300, 300)).save(tmp_path / f"{i}.png")
    for _ in range(4):
        for future in read_ahead(iter(sorted(tmp_path.iterdir())), Preprocess(64), 8):
            future.result()
    with pytest.raises(UserWarning, match="mine"):  # they are errors in this file
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_a_list_is_prepared_ahead_whatever_it_holds(tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).save(tmp_path / "0.jpg")
    lazy = Image.open(tmp_path / "0.jpg")  # reads its pixels when they are asked for
    listed = [lazy, np.zeros((9, 7), np.uint8), lazy, lazy, torch.ones(3, 5, 5), lazy]
    drawn: list[int] = []

    def drawing() -> Iterator[Any]:
        for i, image in enumerate(listed):
            drawn.append(i)
            yield image

    preprocess = Preprocess(64)
    prepared = read_ahead(drawing(), preprocess, 4, listed=True)
    first = next(prepared)
    assert drawn == [0, 1, 2, 3, 4]
    for future, image in zip(chain([first], prepared), listed, strict=True):
        assert torch.equal(future.result()[0], preprocess(image)[0])


def test_readers_leave_the_cores_to_the_network(tmp_path: Path) -> None:
    """Whatever torch computes in a reader's thread, it computes with a team of threads of its own."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    computed = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if out.data_ptr() not in [x.data_ptr() for x in args if isinstance(x, torch.Tensor)]:  # not a view
                computed.append(func)
            return out

    with Operators():
        for image in (tmp_path / "a.png", Image.fromarray(picture()), picture(), torch.from_numpy(picture().T.copy())):
            Preprocess(64)(image)
    assert not computed


@pytest.mark.filterwarnings("default")  # torch's workers warn of their own accord
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_collates_pixels_and_geometry(workers: int) -> None:
    items = [picture(40, 24), picture(7, 90), Strokes(([[0, 0], [9, 5]],), 10, 6)]  # type: ignore[list-item]
    preprocess = Preprocess(32)
    ((batch, geometry),) = DataLoader(Listed(items, preprocess), batch_size=3, num_workers=workers)
    assert batch.shape == (3, 3, 32, 32)
    assert isinstance(geometry, Geometry)
    assert all(torch.equal(a, b) for a, b in zip(geometry, collate([preprocess(i)[1] for i in items]), strict=True))
    assert torch.equal(batch[1], preprocess(items[1])[0])


def test_preprocess_letterboxes_on_white() -> None:
    pixels_, geometry = Preprocess(64)(np.zeros((50, 100, 3), np.uint8))
    assert geometry == Geometry(100, 50, 0, 16, 64, 32, 64)
    assert pixels_.dtype == torch.float32
    assert pixels_.is_contiguous()
    assert (pixels_[:, :16] == 1).all()
    assert (pixels_[:, 16:48] == 0).all()
    assert (pixels_[:, 48:] == 1).all()


def test_preprocess_is_antialiased() -> None:
    checkers = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels_, _ = Preprocess(64)(checkers)
    assert (pixels_ - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 4)])
def test_preprocess_takes_any_shape(size: tuple[int, int]) -> None:
    pixels_, geometry = Preprocess(64)(Image.new("RGB", size))
    left, top = geometry.left, geometry.top
    dark = pixels_[:, top : top + geometry.inner_height, left : left + geometry.inner_width]
    assert (dark == 0).all()
    assert pixels_.sum() == pixels_.numel() - dark.numel()


def test_strokes_are_drawn_at_the_letterboxed_size() -> None:
    strokes = Strokes((np.array([[10.0, 20.0], [90.0, 20.0]]),), 100, 40.2, line_width=0.1)
    pixels_, geometry = Preprocess(512)(strokes)
    assert geometry[:2] == (100, 41)
    darkest = pixels_[0].min(dim=1).values
    row = geometry.to_canvas(torch.tensor([[50.0, 20.0]]))[0, 1] * 512
    assert abs(int(darkest.argmin()) + 0.5 - row) <= 1
    assert (darkest < 0.9).sum() <= 2  # a line of one pixel, which no enlarged bitmap would give


def test_preprocess_is_picklable_and_checks_its_size() -> None:
    copy = pickle.loads(pickle.dumps(Preprocess(40)))
    assert torch.equal(copy(picture())[0], Preprocess(40)(picture())[0])
    for size in (0, -8, 12, 8.0, "8", True, None):
        with pytest.raises(ConfigError, match="multiple of 8"):
            Preprocess(size)  # type: ignore[arg-type]


# One picture, many kinds


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_the_same_picture_gives_the_same_pixels(channels: int, tmp_path: Path) -> None:
    array = picture(channels=channels)
    flat = array[:, :, 0] if channels == 1 else array
    Image.fromarray(flat).save(tmp_path / "picture.png")
    chw = torch.from_numpy(array).permute(2, 0, 1)
    kinds: dict[str, Any] = {
        "string": str(tmp_path / "picture.png"),
        "path": tmp_path / "picture.png",
        "pil": Image.open(tmp_path / "picture.png"),
        "float32": flat.astype(np.float32) / 255,
        "float64": flat / 255,
        "big endian": (flat / 255).astype(">f8"),
        "reversed": flat[::-1].copy()[::-1],
        "fortran": np.asfortranarray(flat),
        "read only": np.frombuffer(flat.tobytes(), np.uint8).reshape(flat.shape),
        "tensor": chw,
        "contiguous": chw.contiguous(),
        "float tensor": chw / 255,
        "float16": (chw / 255).half(),
        "graph": (chw / 255).requires_grad_(),
    }
    if torch.cuda.is_available():
        kinds["cuda"] = chw.cuda()
    expected, geometry = Preprocess(32)(flat)
    for name, kind in kinds.items():
        found, place = Preprocess(32)(kind)
        assert torch.equal(found, expected), name
        assert place == geometry, name


def test_bfloat16_tensors_are_read() -> None:
    assert pixels(torch.full((1, 2, 2), 0.5, dtype=torch.bfloat16)).tolist() == [[[128] * 3] * 2] * 2


def test_floats_a_hair_outside_are_clipped() -> None:
    assert pixels(np.array([[-5e-7, 1 + 5e-7]])).tolist() == [[[0] * 3, [255] * 3]]


# PIL modes, as a person sees them


def test_alpha_is_composited_on_white() -> None:
    half = [255 - 128] * 3
    black = np.zeros((1, 3, 4), np.uint8)
    black[0, :, 3] = [0, 128, 255]
    seen = [[[255] * 3, half, [0] * 3]]
    rgba = Image.fromarray(black)
    assert pixels(black).tolist() == seen
    assert pixels(rgba.convert("LA")).tolist() == seen
    assert pixels(rgba.convert("RGBa")).tolist() == seen
    assert pixels(rgba.convert("LA").convert("La")).tolist() == seen
    assert pixels(rgba.convert("PA")).tolist() == seen


def test_palettes_and_their_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert pixels(image).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    as_int = encoded(image, transparency=1)
    assert pixels(Image.open(io.BytesIO(as_int))).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    as_bytes = encoded(image, transparency=bytes([255, 0, 128]))
    assert pixels(Image.open(io.BytesIO(as_bytes))).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 255]]]


def test_a_transparent_colour_is_paper() -> None:
    for mode, key, other in (("L", 9, 10), ("RGB", (9, 9, 9), (10, 10, 10)), ("1", 0, 255)):
        image = Image.new(mode, (2, 1), key)
        image.putpixel((1, 0), other)
        found = pixels(Image.open(io.BytesIO(encoded(image, transparency=key))))
        assert found[0, :, 0].tolist() == [255, other if mode == "1" else 10], mode


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opaque_modes_look_alike(mode: str) -> None:
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((1, 0), (0, 0, 0))
    assert np.abs(pixels(image.convert(mode)).astype(int) - pixels(image)).max() <= 2
    if mode not in ("1", "L"):
        red = Image.new("RGB", (1, 1), (200, 40, 30))
        assert np.abs(pixels(red.convert(mode)).astype(int) - [200, 40, 30]).max() <= 4


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I", "F"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    image = Image.new(mode, (4, 1))
    for x, value in enumerate([0, 257 * 100, 257 * 200, 65535]):
        image.putpixel((x, 0), value)
    assert pixels(image)[0, :, 0].tolist() == [0, 100, 200, 255]
    assert pixels(image)[0, :, 2].tolist() == [0, 100, 200, 255]


def test_sixteen_bit_files(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert (pixels(tmp_path / name)[:, :, 1] == values // 257).all()


def test_ranges_of_the_modes_that_do_not_say_theirs() -> None:
    grey = Image.fromarray(picture(channels=1)[:, :, 0])
    for mode in ("I", "F"):
        assert np.array_equal(pixels(grey.convert(mode)), pixels(grey))
    unit = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    assert np.array_equal(pixels(unit), pixels(grey))
    for value in (-1, 70000):
        for mode in ("I", "F"):
            with pytest.raises(ImageError, match="0 to 65535"):
                open_image(Image.new(mode, (2, 2), value))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ImageError, match="not finite"):
            open_image(Image.new("F", (2, 2), value))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 255  # white in the top left corner
    back = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    undo = [
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    stored = Image.fromarray(upright)
    if orientation in back:
        stored = stored.transpose(Image.Transpose[undo[back[orientation]]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = Image.open(io.BytesIO(encoded(stored, kind, exif=exif)))
    found = open_image(opened)
    assert found.size == (64, 32)
    assert open_image(found).tobytes() == found.tobytes()  # turned once
    assert open_image(opened).tobytes() == found.tobytes()  # and the caller's is as it was
    assert np.abs(np.asarray(found).astype(int) - upright)[4:12, 4:28].max() < 30
    assert np.asarray(found)[20:, 36:].max() < 30


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jpg"
    path.write_bytes(encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\x01"))
    assert pixels(path).shape == (24, 40, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_animations(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"moving.{kind.lower()}"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (pixels(path) == [255, 0, 0]).all()


def test_pil_images_are_left_as_they_were() -> None:
    image = Image.fromarray(picture(channels=4))
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


# Refusals


def refused(image: Any, message: str) -> ImageError:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(image)
    assert caught.value.source
    assert caught.value.index is None
    assert caught.value.problem in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((4, 4, 1), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), "channels first make a tensor"),
        (np.zeros(4, np.uint8), r"\(H, W, 3\)"),
        (np.uint8(3) + np.zeros((), np.uint8), r"\(H, W, 3\)|accepted"),
        (np.zeros((1, 2, 4, 3), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 0)), "no pixels"),
        (np.full((2, 2), 300), "int64, these go from 300 to 300"),
        (np.full((2, 2), 300, np.uint16), r"uint16.*300"),
        (np.ones((2, 2), bool), "bool"),
        (np.ones((2, 2), complex), "complex"),
        (np.full((2, 2), None), "object"),
        (np.array([["a", "b"]]), "<U1"),
        (np.array([[0.0, 255.0]]), r"\[0, 1\], these go from 0 to 255"),
        (np.array([[-0.5, 0.5]]), r"these go from -0.5 to 0.5"),
        (np.array([[1.00001]]), "these go from"),
        (np.array([[1e300]]), "these go from"),
        (np.array([[np.nan, 0]]), "not finite"),
        (np.array([[np.inf, 0]], np.float16), "not finite"),
    ],
    ids=str,
)
def test_arrays_that_are_no_images(array: np.ndarray, message: str) -> None:
    refused(array, message)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 4, 4), r"\(3, H, W\)"),
        (torch.zeros(4, 4), "adds the channel"),
        (torch.zeros(4, 4, 3), r"\(3, H, W\)|no pixels"),
        (torch.zeros(1, 3, 4, 4), r"\(3, H, W\)"),
        (torch.zeros(3, 0, 4), "no pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "int32"),
        (torch.full((3, 4, 4), 255.0), "these go from 255 to 255"),
        (torch.full((3, 4, 4), -1.0), "these go from -1"),
        (torch.full((3, 4, 4), torch.nan), "not finite"),
        (torch.zeros(3, 4, 4, device="meta"), "meta"),
        (torch.zeros(3, 4, 4).to_sparse(), "sparse"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_tensors_that_are_no_images(tensor: torch.Tensor, message: str) -> None:
    if tensor.shape == (4, 4, 3):  # four channels, as far as a tensor can tell
        assert open_image(tensor).size == (3, 4)
        return
    refused(tensor, message)


@pytest.mark.parametrize("thing", [None, 3, {"a": 1}, b"png", object(), [1, 2]], ids=repr)
def test_objects_that_are_no_images(thing: Any) -> None:
    error = refused(thing, "accepted: a path")
    assert error.source == type(thing).__name__


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(str(tmp_path / "none.png"), "No such file").source == str(tmp_path / "none.png")
    refused(tmp_path, "a directory")
    refused("a\0b.png", "null")
    refused("x" * 5000, "too long")
    refused("~/cat.png", "No such file")
    refused(tmp_path / "none.svg", "No such file")
    refused("cats.ndjson", "many drawings.*from_quickdraw")
    (tmp_path / "text.png").write_text("no image")
    refused(tmp_path / "text.png", "not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "not an image")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    refused(tmp_path / "page.eps", "PostScript")
    if os.geteuid():
        (tmp_path / "text.png").chmod(0)
        refused(tmp_path / "text.png", "Permission denied")

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbid)
    for name in ("secret.png", "secret.svg"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "Permission denied")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(picture(100, 80)), kind)
    for part in (0.1, 0.5, 0.9):
        path = tmp_path / f"{part}.{kind.lower()}"
        path.write_bytes(whole[: int(len(whole) * part)])
        refused(path, "truncated|not an image|cannot be decoded")


def test_a_pil_image_of_a_truncated_file() -> None:
    whole = encoded(Image.fromarray(picture(100, 80)))
    assert refused(Image.open(io.BytesIO(whole[: len(whole) // 2])), ".").source == "PngImageFile"
    closed = Image.open(io.BytesIO(whole))
    closed.close()
    refused(closed, "cannot be decoded")
    refused(Image.new("RGB", (0, 3)), "no pixels")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), st.data())
def test_damaged_files_raise_image_errors_or_load(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(Image.fromarray(picture(20, 12)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        images._decoded(io.BytesIO(damaged), "damaged")


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "bomb.png").write_bytes(bomb(50, 50))
    refused(tmp_path / "bomb.png", "too large.*limit")
    (tmp_path / "large.png").write_bytes(bomb(50, 30))  # between once and twice the limit: Pillow only warns
    refused(tmp_path / "large.png", "limit of 1000 pixels")  # as a user may want it: warnings are errors in this file
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_image(tmp_path / "large.png").size == (50, 30)


def test_files_are_closed(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "good.gif")
    (tmp_path / "bad.png").write_bytes(encoded(Image.fromarray(picture()))[:200])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    opened = open_image(tmp_path / "good.gif")
    with pytest.raises(ImageError):
        open_image(tmp_path / "bad.png")
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert opened.getpixel((0, 0)) is not None


# URLs


class Site(BaseHTTPRequestHandler):
    image = encoded(Image.fromarray(picture()))
    svg = b"<svg viewBox='0 0 40 24'><path d='M1 1L39 23'/></svg>"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/drip":
            self.answer(self.image, length=len(self.image), drip=True)
        elif path == "/drip-headers":
            for byte in b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 50:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/to/"))
            self.end_headers()
        elif path == "/huge":
            self.answer(b"x" * 5000, length=None)
        elif path == "/announced":
            self.answer(b"", length=10**9)
        elif path == "/page":
            self.answer(b"<!doctype html><title>cat.png</title>", length=None)
        elif path == "/cut":
            self.answer(self.image[:300], length=len(self.image))
        elif path == "/nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
        elif path == "/drawing.svg":
            self.answer(self.svg, length=len(self.svg))
        elif path in ("/cat.png", "/%C3%A4%20b.png"):
            self.answer(self.image, length=len(self.image))
        else:
            self.send_error(404)

    def answer(self, body: bytes, length: int | None, drip: bool = False) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        for at in range(0, len(body), 20 if drip else len(body)):
            self.wfile.write(body[at : at + (20 if drip else len(body))])
            time.sleep(0.1 if drip else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_urls_are_fetched(site: str) -> None:
    assert np.array_equal(pixels(f"{site}/cat.png"), picture())
    assert np.array_equal(pixels(f"{site}/cat.png?width=3".replace("http", "HTTP")), picture())
    assert np.array_equal(pixels(f"{site}/to//cat.png"), picture())
    assert np.array_equal(pixels(f"{site}/ä b.png"), picture())
    drawing = open_image(f"{site}/drawing.svg")
    assert isinstance(drawing, Strokes)
    assert drawing.size == (40, 24)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.png", "HTTP 404"),
        ("/page", "not an image"),
        ("/cut", "truncated|cannot be decoded"),
        ("/nonsense", "cannot be fetched|unreachable"),
        ("/to/file:///etc/hostname", "file:///etc/hostname"),
        ("/to/ftp://127.0.0.1/cat.png", "redirected to ftp"),
        ("/to/data:image/png;base64,AAAA", "data:image"),
    ],
)
def test_urls_that_are_refused(site: str, path: str, message: str) -> None:
    assert refused(site + path, message).source == site + path


def test_the_size_of_a_download_is_bounded(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "URL_BYTES", 1000)
    refused(f"{site}/huge", "larger than")
    refused(f"{site}/announced", "larger than")


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_the_time_of_a_download_is_bounded(site: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "URL_SECONDS", 0.5)
    started = time.monotonic()
    refused(site + path, "within 0.5 seconds")
    assert time.monotonic() - started < 2


def test_a_download_that_is_late_ends_by_itself(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "URL_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        images._fetched(f"{site}/drip")
    assert time.monotonic() - started < 2


def test_a_server_that_is_not_there() -> None:
    refused("http://127.0.0.1:1/cat.png", "unreachable")
    refused("http://", "unreachable|cannot be fetched")
    refused("http://127.0.0.1:port/cat.png", "unreachable|cannot be fetched")


@pytest.mark.parametrize(
    "url", ["ftp://a/b.png", "file:///etc/hostname", "data:image/png;base64,AA", "s3://a/b", "file:x"]
)
def test_other_schemes_are_refused(url: str) -> None:
    assert refused(url, "only http and https").source == url


# What encode receives


def test_single_images_and_lists(tmp_path: Path) -> None:
    strokes = Strokes(([[0, 0]],), 4, 4)  # type: ignore[arg-type]
    arrays = [np.zeros((2, 2)), np.zeros((2, 2, 3)), torch.zeros(3, 2, 2)]
    singles: list[Any] = ["a.png", tmp_path, Image.new("L", (2, 2)), strokes, *arrays]
    for one in singles:
        stream, single = as_stream(one)
        assert single
        (found,) = stream
        assert found is one
    for many in (singles, tuple(singles), iter(singles), (one for one in singles)):
        stream, single = as_stream(many)
        assert not single
        assert [a is b for a, b in zip(stream, singles, strict=True)] == [True] * len(singles)
    assert list(as_stream([])[0]) == []


def test_a_tensor_of_four_dimensions_is_a_list() -> None:
    batch = torch.rand(3, 3, 4, 5)
    stream, single = as_stream(batch)
    assert not single
    assert all(torch.equal(a, b) for a, b in zip(stream, batch, strict=True))
    assert list(as_stream(batch[:0])[0]) == []
    with pytest.raises(ImageError, match=r"list\(array\)"):
        as_stream(np.zeros((2, 4, 4, 3)))


def test_iterators_are_drawn_from_one_by_one() -> None:
    drawn: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            drawn.append(len(drawn))
            yield np.zeros((2, 2))

    stream, single = as_stream(endless())
    assert (single, drawn) == (False, [])
    next(stream)
    assert drawn == [0]


@pytest.mark.parametrize("thing", [None, {"a": "b.png"}, {"a.png"}, frozenset(), b"x", 7, 1.5, io.BytesIO(), object()])
def test_what_is_neither_an_image_nor_many(thing: Any) -> None:
    with pytest.raises(ImageError, match="accepted") as caught:
        as_stream(thing)
    assert caught.value.source == type(thing).__name__


# Published data


def test_published_sketches_are_dark_lines_on_white_paper(members: Any) -> None:
    for name, prefix in (("sketchy", "256x256/sketch/"), ("tuberlin", "png/")):
        for path in members(name, prefix, 3):
            sketch, geometry = Preprocess(256)(path)
            assert geometry.mask(8).all()
            assert sketch.mean() > 0.8, path
            assert sketch.min() < 0.1, path
