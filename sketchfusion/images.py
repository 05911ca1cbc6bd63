"""Whatever a user has -> RGB on white -> tensor; the letterbox and its inverse.

Every picture passes through 8-bit RGB on its way, whatever it came as, so that a file, its PIL image, its
array in 0..255 or in [0, 1] and its tensor all give the same pixels. Float images are thereby rounded to
1/255.
"""

from __future__ import annotations

import io
import numbers
import os
import queue
import re
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import ConfigError, ImageError
from .strokes import Strokes, open_regular

ImageInput = str | os.PathLike | Image.Image | np.ndarray | Tensor | Strokes

ACCEPTED = (
    "a path, an http(s) URL, a PIL image, a numpy array (H, W), (H, W, 3) or (H, W, 4), "
    "a tensor (1, H, W), (3, H, W) or (4, H, W), or Strokes"
)
URL_SECONDS = 20.0  # in all, from looking up the name to the last byte
URL_BYTES = 64 * 2**20
_LOADING = threading.Lock()  # Pillow reads a file when its pixels are asked for: not twice, where a list has it twice
READERS = min(8, os.cpu_count() or 1)  # threads


class Geometry(NamedTuple):
    """Where an image lies on its square canvas: ints for one image, (N,) int64 tensors for a batch.

    Two systems of coordinates, both x then y, continuous: original pixels, where the centre of the top-left
    pixel is (0.5, 0.5), and the canvas, from (0, 0), its top-left corner, to (1, 1).
    """

    width: int | Tensor  # of the original image, in pixels, after EXIF rotation
    height: int | Tensor  # the same
    left: int | Tensor  # of the image on the canvas, in canvas pixels
    top: int | Tensor  # the same
    inner_width: int | Tensor  # the image's width on the canvas, in canvas pixels
    inner_height: int | Tensor  # the same for its height
    canvas: int | Tensor  # the canvas's side, in pixels

    def image(self, i: int) -> Geometry:
        """The geometry of the i-th image of a batch, in ints."""
        return Geometry(*(int(torch.as_tensor(field)[i]) for field in self))

    def mask(self, grid: int) -> Tensor:
        """Which cells of a grid x grid map count as image: bool (grid, grid), or (N, grid, grid) for a batch.

        Those whose centre lies on the image. Where the image is so thin that it misses all the centres, those
        that contain the image's middle; so one at least always counts.
        """
        columns = _cells(self.left, self.inner_width, self.canvas, grid)
        rows = _cells(self.top, self.inner_height, self.canvas, grid)
        return rows[..., :, None] & columns[..., None, :]

    def to_canvas(self, points: Tensor) -> Tensor:
        """Points in original pixels -> canvas, in the points' float type.

        (P, 2) for one image; for a batch (P, 2), the same for all, or (N, P, 2), either giving (N, P, 2).
        """
        scale, offset = self._placement(points)
        return points * scale + offset

    def to_original(self, points: Tensor) -> Tensor:
        """Points on the canvas -> original pixels: the inverse of `to_canvas`, with the same shapes."""
        scale, offset = self._placement(points)
        return (points - offset) / scale

    def _placement(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset, (1, 2) or (N, 1, 2), in the points' float type, on their device."""

        def pair(x: int | Tensor, y: int | Tensor) -> Tensor:
            exact = [torch.as_tensor(number, dtype=torch.float64) for number in (x, y)]
            return torch.stack(exact, dim=-1).unsqueeze(-2)

        dtype = points.dtype if points.is_floating_point() else torch.float64
        canvas = pair(self.canvas, self.canvas)
        scale = pair(self.inner_width, self.inner_height) / pair(self.width, self.height) / canvas
        offset = pair(self.left, self.top) / canvas
        return scale.to(points.device, dtype), offset.to(points.device, dtype)


def _cells(first: int | Tensor, extent: int | Tensor, canvas: int | Tensor, grid: int) -> Tensor:
    """Along one axis: which of `grid` cells count as image, (grid,) or (N, grid).

    Lengths are multiplied by 2 * grid, which makes every edge and centre a whole number, and the comparisons
    exact.
    """
    first, extent, canvas = (torch.as_tensor(number)[..., None] for number in (first, extent, canvas))
    cell = torch.arange(grid, device=first.device)
    centre = (2 * cell + 1) * canvas
    on_image = (2 * grid * first <= centre) & (centre <= 2 * grid * (first + extent))
    middle = grid * (2 * first + extent)
    around_middle = (2 * cell * canvas <= middle) & (middle <= 2 * (cell + 1) * canvas)
    return torch.where(on_image.any(-1, keepdim=True), on_image, around_middle)


def collate(geometries: Sequence[Geometry]) -> Geometry:
    """N geometries of single images -> the geometry of their batch, (N,) int64 tensors; N may be 0."""
    rows = torch.tensor(geometries, dtype=torch.int64, device="cpu").reshape(len(geometries), len(Geometry._fields))
    return Geometry(*(column.clone() for column in rows.unbind(1)))


class Preprocess:
    """An image -> ((3, S, S) float32 pixels in [0, 1], Geometry): the letterbox.

    The aspect ratio is kept: the longer side becomes S, the shorter is rounded, 1 at least, centred, and the
    rest is white. Resized by antialiased bicubic interpolation; Strokes are drawn at the size itself.
    Picklable and without weights, so it works in DataLoader workers, whose collate function batches both.

    Raises:
        ConfigError: `size` is no positive multiple of 8; called, ImageError for what is no image, and for a drawing of
            too many lines with too thick a pen.
    """

    def __init__(self, size: int):
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size <= 0 or size % 8:
            raise ConfigError("size", f"{size!r} cannot be the side of a canvas", legal="a positive multiple of 8")
        self.size: int = int(size)

    def __call__(self, image: ImageInput) -> tuple[Tensor, Geometry]:
        opened = open_image(image)
        geometry = letterbox(*opened.size, self.size)
        inner = (int(geometry.inner_width), int(geometry.inner_height))
        if isinstance(opened, Strokes):
            try:
                placed = opened.render(*inner).convert("RGB")
            except ImageError as error:
                raise ImageError(error.problem, source=_place(image) or error.source) from None
        else:
            placed = opened.resize(inner, Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (self.size, self.size), "white")
        canvas.paste(placed, (int(geometry.left), int(geometry.top)))
        # Not by torch, whose threads would take the cores from the network: one team for each thread that reads images.
        pixels = np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        return torch.from_numpy(pixels), geometry

    def __repr__(self) -> str:
        return f"Preprocess(size={self.size})"


def _place(image: ImageInput) -> str | None:
    return os.fsdecode(image) if isinstance(image, str | os.PathLike) else None


def letterbox(width: int, height: int, canvas: int) -> Geometry:
    """The geometry of an image of `width` x `height` pixels, fitted and centred on a square canvas."""
    longer = max(width, height)

    def fitted(side: int) -> int:
        return max(1, (2 * side * canvas + longer) // (2 * longer))  # rounded half up

    inner_width, inner_height = fitted(width), fitted(height)
    left, top = (canvas - inner_width) // 2, (canvas - inner_height) // 2
    return Geometry(width, height, left, top, inner_width, inner_height, canvas)


def as_stream(images: object) -> tuple[Iterator[ImageInput], bool]:
    """What `encode` was given -> (its images, whether it was a single one). Iterators are not drawn from here.

    A string, path, PIL image, Strokes, array or tensor is a single image; a tensor of four dimensions is the
    list of its images. Any other iterable is one of images; whether each is one shows when it is opened.

    Raises:
        ImageError: what is neither: None, dicts, sets, bytes, open files, and arrays of four dimensions.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        return iter(images), False
    if isinstance(images, np.ndarray) and images.ndim == 4:
        raise ImageError("an array of four dimensions; pass list(array) for its images", source=_type_name(images))
    if isinstance(images, ImageInput):
        return iter([images]), True
    if isinstance(images, Mapping | set | frozenset | bytes | bytearray | io.IOBase):
        raise _not_an_image(images)
    try:
        return iter(images), False  # type: ignore[call-overload]
    except TypeError:
        raise _not_an_image(images) from None


def read_ahead(
    images: Iterator[Any], preprocess: Callable[[Any], tuple[Tensor, Geometry]], count: int, *, listed: bool = False
) -> Generator[Future[tuple[Tensor, Geometry]], None, None]:
    """Every image preprocessed, in order; threads read and decode up to `count` files and URLs ahead.

    What is in memory already is preprocessed as it is drawn, and nothing is drawn before its turn: who made it may
    write the next one into it, or may be a camera. Not so if they are `listed`, all there from the start.
    """
    waiting: deque[Future[tuple[Tensor, Geometry]]] = deque()
    readers = ThreadPoolExecutor(READERS, thread_name_prefix="sketchfusion-reader")
    try:
        for image in images:
            if listed or isinstance(image, str | os.PathLike):
                waiting.append(readers.submit(preprocess, image))
                if len(waiting) > count:
                    yield waiting.popleft()
                continue
            while waiting:
                yield waiting.popleft()
            prepared: Future[tuple[Tensor, Geometry]] = Future()
            try:
                prepared.set_result(preprocess(image))
            except ImageError as error:
                prepared.set_exception(error)
            yield prepared
        while waiting:
            yield waiting.popleft()
    finally:
        readers.shutdown(cancel_futures=True)


def open_image(image: ImageInput) -> Image.Image | Strokes:
    """The image as a person would see it on white paper, in mode "RGB"; Strokes and `.svg` files as Strokes.

    Strings that begin with `http://` or `https://` are URLs, others paths (`~` is not expanded). Alpha is
    composited on white, EXIF orientation is applied, files give their first frame and PIL images the frame
    they stand at. Greys of more than 8 bits are scaled: 16-bit modes from 0..65535; mode I, which does not
    say its range, from 0..65535 unless nothing is above 255; mode F likewise, and from [0, 1] where nothing
    is above 1. ICC profiles are not applied. Arrays and tensors are uint8 in 0..255 or floats in [0, 1].

    Raises ImageError, and nothing else, for whatever cannot be read.
    """
    match image:
        case str() if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(?:data|file):", image):
            if (scheme[1] or "").lower() not in ("http", "https"):
                raise ImageError("only http and https URLs are fetched", source=_shortened(image))
            return _from_url(image)
        case str() | os.PathLike():
            return _from_path(os.fsdecode(image))
        case Strokes():
            return image
        case Image.Image():
            with _decoding(type(image).__name__):
                with _LOADING:
                    image.load()
                    _orientation(image)
                return _on_white(image)
        case np.ndarray():
            return _from_array(image)
        case Tensor():
            return _from_tensor(image)
    raise _not_an_image(image)


def _not_an_image(thing: object) -> ImageError:
    return ImageError(f"not an image; accepted: {ACCEPTED}", source=_type_name(thing))


def _type_name(thing: object) -> str:
    name = type(thing).__name__
    return f"{name} {tuple(thing.shape)}, {thing.dtype}" if isinstance(thing, np.ndarray | Tensor) else name


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


# Files and URLs


def _from_path(path: str) -> Image.Image | Strokes:
    kind = os.path.splitext(path)[1].lower()
    if kind == ".ndjson":
        raise ImageError(
            "a file of many drawings, not an image; Strokes.from_quickdraw reads one of its lines",
            source=path,
        )
    if kind == ".svg":
        return Strokes.from_svg(Path(path))
    with open_regular(path) as file:
        return _decoded(file, path)


def _from_url(url: str) -> Image.Image | Strokes:
    data = _downloaded(url)
    if urllib.parse.urlsplit(url).path.lower().endswith(".svg"):
        try:
            return Strokes.from_svg(data)
        except ImageError as error:
            raise ImageError(error.problem, source=url) from None
    return _decoded(io.BytesIO(data), url)


def _downloaded(url: str) -> bytes:
    """The body of an http(s) URL.

    A thread does the work, as nothing else bounds the time that looking up a name or a dripping server may
    take. It is left behind where it is late, and ends at its next time-out.
    """
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(_fetched(url))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=URL_SECONDS)
    except queue.Empty:
        answer = TimeoutError()
    match answer:
        case bytes():
            return answer
        case ImageError():
            raise answer
        case TimeoutError() | urllib.error.URLError(reason=TimeoutError()):
            problem = f"no complete answer within {URL_SECONDS:g} seconds"
        case urllib.error.HTTPError():
            answer.close()
            problem = f"the server answered HTTP {answer.code}: {answer.reason}"
        case urllib.error.URLError():
            problem = f"unreachable: {answer.reason}"
        case _:
            problem = f"cannot be fetched: {answer or type(answer).__name__}"
    raise ImageError(problem, source=url)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; urllib's own follows ftp as well."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            fp.close()
            raise ImageError(f"redirected to {_shortened(newurl)}, not an http(s) URL", source=req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetched(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # build_opener would add file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    deadline = time.monotonic() + URL_SECONDS
    too_large = ImageError(f"larger than {URL_BYTES / 2**20:g} MiB", source=url)
    address = urllib.parse.quote(url, safe=string.punctuation)  # spaces and letters beyond ASCII
    request = urllib.request.Request(address, headers={"User-Agent": "sketchfusion"})
    with opener.open(request, timeout=URL_SECONDS) as response:
        if int(response.headers.get("Content-Length") or 0) > URL_BYTES:
            raise too_large
        body = bytearray()
        while part := response.read1(2**16):
            body += part
            if len(body) > URL_BYTES:
                raise too_large
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(body)


# Pixels


def _decoded(file: BinaryIO, source: str) -> Image.Image:
    with _decoding(source):
        opened = Image.open(file)
        if opened.format == "EPS":  # Pillow would run Ghostscript on it
            raise ImageError("PostScript is a program, and is not run; convert it to PNG or SVG")
        return _on_white(opened)


# As `warnings.filters` has it: of odd metadata, and not of images near the limit, which stays the user's to filter.
_PILLOW_WARNS = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)


@contextmanager
def _decoding(source: str) -> Iterator[None]:
    """Turns whatever Pillow raises into an ImageError with the source, and silences what it warns of in metadata.

    Everything is caught, as decoders raise anything over a damaged file, from SyntaxError to struct.error.
    """
    # For good: `catch_warnings` in one thread brings back, or takes away, what another has put there.
    if warnings.filters[:1] != [_PILLOW_WARNS]:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW_WARNS[3].pattern)
    try:
        yield
    except ImageError as error:
        problem = error.problem
    except UnidentifiedImageError:
        problem = "not an image, or of a format that Pillow does not know"
    except Image.DecompressionBombError as error:
        problem = f"too large: {error}"
    except Exception as error:
        problem = f"cannot be decoded: {error or type(error).__name__}"
    else:
        return
    raise ImageError(problem, source=source)


def _on_white(image: Image.Image) -> Image.Image:
    """Any PIL image -> RGB, upright, composited on white."""
    image.load()
    if 0 in image.size:
        raise ImageError(f"it has no pixels: {image.width} x {image.height}")
    turn = _TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_greys(image)
    elif image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # its orientation among it, which would turn the image again where it is opened twice
    return image


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Read after the pixels: some formats turn them on
    loading.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata; viewers show such images as they lie
        return 1


def _scaled_greys(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F -> L, by the rule that `open_image` states."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ImageError("it holds values that are not finite")
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if high <= white), None)
    if white is None or low < 0:
        raise ImageError(f"its values go from {low:g} to {high:g}; mode {image.mode} is read in 0 to 65535")
    transparent = image.info.get("transparency")  # one grey that stands for the paper, in 16-bit PNG
    if isinstance(transparent, int):
        values[values == transparent] = white
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    array = np.asarray(array)
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        hint = "; channels first make a tensor" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"an array is (H, W), (H, W, 3) or (H, W, 4){hint}", source=_type_name(array))
    return _from_levels(array, _type_name(array))


def _from_tensor(tensor: Tensor) -> Image.Image:
    source = _type_name(tensor)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        hint = "; tensor[None] adds the channel" if tensor.ndim == 2 else ""
        raise ImageError(f"a tensor is (1, H, W), (3, H, W) or (4, H, W){hint}", source=source)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ImageError("a sparse or meta tensor; pass a dense one", source=source)
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values.float()  # numpy has no bfloat16
    array = values.permute(1, 2, 0).numpy()
    return _from_levels(array[:, :, 0] if len(values) == 1 else array, source)


def _from_levels(array: np.ndarray, source: str) -> Image.Image:
    """(H, W), (H, W, 3) or (H, W, 4) of uint8 or floats in [0, 1] -> RGB on white."""
    if array.size == 0:
        raise ImageError("it has no pixels", source=source)
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all():
            raise ImageError("it holds values that are not finite", source=source)
        if low < -1e-6 or high > 1 + 1e-6:
            raise ImageError(f"floats are taken in [0, 1], these go from {low:g} to {high:g}", source=source)
        array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        found = f", these go from {array.min()} to {array.max()}" if array.dtype.kind in "iub" else ""
        raise ImageError(f"taken are uint8 in 0 to 255 and floats in [0, 1], not {array.dtype}{found}", source=source)
    return _on_white(Image.fromarray(np.ascontiguousarray(array)))
