"""Whatever a user has -> RGB on white -> tensor; the letterbox and its inverse.

Every picture passes through 8-bit RGB on its way, whatever it came as, so that a file, its PIL image, its array in
0..255 or in [0, 1] and its tensor all give the same pixels. Float images are thereby rounded to 1/255.
"""

import http.client
import io
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sketchfusion.errors import ConfigError, ImageError
from sketchfusion.strokes import Strokes

ImageInput = str | os.PathLike | Image.Image | np.ndarray | Tensor | Strokes

ACCEPTED = (
    "a path, an http(s) URL, a PIL image, a numpy array (H, W), (H, W, 3) or (H, W, 4), "
    "a tensor (1, H, W), (3, H, W) or (4, H, W), or Strokes"
)
URL_SECONDS = 20.0  # in all, from looking up the name to the last byte
URL_BYTES = 64 * 2**20


class Geometry(NamedTuple):
    """Where an image lies on its square canvas: ints for one image, (N,) int64 tensors for a batch.

    Two systems of coordinates, both x then y, continuous: original pixels, where the centre of the top-left pixel is
    (0.5, 0.5), and the canvas, from (0, 0), its top-left corner, to (1, 1).
    """

    width: int | Tensor  # of the original image, in pixels, after EXIF rotation
    height: int | Tensor
    left: int | Tensor  # where the image lies on the canvas, in canvas pixels
    top: int | Tensor
    inner_width: int | Tensor
    inner_height: int | Tensor
    canvas: int | Tensor  # the canvas's side in pixels

    def image(self, i: int) -> "Geometry":
        """The geometry of the i-th image of a batch, in ints."""
        return Geometry(*(int(torch.as_tensor(field)[i]) for field in self))

    def mask(self, grid: int) -> Tensor:
        """Which cells of a grid x grid map count as image: bool (grid, grid), or (N, grid, grid) for a batch.

        Those whose centre lies on the image. Where the image is so thin that it misses all the centres, those that
        contain the image's middle; so one at least always counts.
        """
        columns = _cells(self.left, self.inner_width, self.canvas, grid)
        rows = _cells(self.top, self.inner_height, self.canvas, grid)
        return rows[..., :, None] & columns[..., None, :]

    def to_canvas(self, points: Tensor) -> Tensor:
        """Points in original pixels -> canvas. (P, 2) for one image; (P, 2), the same for all, or (N, P, 2) for a
        batch, which gives (N, P, 2). The points' float type is kept, and float64 exact to 1e-9.
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

    Lengths are multiplied by 2 * grid, which makes every edge and centre a whole number, and the comparisons exact.
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
    rows = torch.tensor(geometries, dtype=torch.int64).reshape(len(geometries), len(Geometry._fields))
    return Geometry(*(column.clone() for column in rows.unbind(1)))


class Preprocess:
    """An image -> ((3, S, S) float32 pixels in [0, 1], Geometry): the letterbox.

    The aspect ratio is kept: the longer side becomes S, the shorter is rounded, 1 at least, centred, and the rest is
    white. Resized by antialiased bicubic interpolation; Strokes are drawn at the size itself. Picklable and without
    weights, so it works in DataLoader workers, whose collate function batches both.

    Raises ConfigError where `size` is no positive multiple of 8; called, ImageError for what is no image.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % 8:
            raise ConfigError("size", f"{size!r} cannot be the side of a canvas", legal="a positive multiple of 8")
        self.size = size

    def __call__(self, image: ImageInput) -> tuple[Tensor, Geometry]:
        opened = open_image(image)
        geometry = letterbox(*opened.size, self.size)
        inner = (int(geometry.inner_width), int(geometry.inner_height))
        if isinstance(opened, Strokes):
            placed = opened.render(*inner).convert("RGB")
        else:
            placed = opened.resize(inner, Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (self.size, self.size), "white")
        canvas.paste(placed, (int(geometry.left), int(geometry.top)))
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32) / 255, geometry

    def __repr__(self) -> str:
        return f"Preprocess(size={self.size})"


def letterbox(width: int, height: int, canvas: int) -> Geometry:
    """The geometry of an image of `width` x `height` pixels, fitted and centred on a square canvas."""
    longer = max(width, height)
    inner = [max(1, (2 * side * canvas + longer) // (2 * longer)) for side in (width, height)]  # rounded half up
    left, top = ((canvas - side) // 2 for side in inner)
    return Geometry(width, height, left, top, *inner, canvas)


def as_stream(images: object) -> tuple[Iterator[ImageInput], bool]:
    """What `encode` was given -> (its images, whether it was a single one). Iterators are not drawn from here.

    A string, path, PIL image, Strokes, array or tensor is a single image; a tensor of four dimensions is the list of
    its images. Any other iterable is one of images; whether each is one shows when it is opened.

    Raises ImageError for what is neither: None, dicts, sets, bytes, open files, and arrays of four dimensions.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        return iter(images), False
    if isinstance(images, np.ndarray) and images.ndim == 4:
        raise ImageError(
            "an array of four dimensions; pass list(array) for its images", source=_type_name(images)
        )
    if isinstance(images, ImageInput):
        return iter([images]), True
    if isinstance(images, Mapping | set | frozenset | bytes | bytearray | io.IOBase):
        raise _not_an_image(images)
    try:
        return iter(images), False  # type: ignore[call-overload]
    except TypeError:
        raise _not_an_image(images) from None


def open_image(image: ImageInput) -> Image.Image | Strokes:
    """The image as a person would see it on white paper, in mode "RGB"; Strokes and `.svg` files as Strokes.

    Strings that begin with `http://` or `https://` are URLs, others paths (`~` is not expanded). Alpha is composited on
    white, EXIF orientation is applied, files give their first frame and PIL images the frame they stand at. Greys of
    more than 8 bits are scaled: 16-bit modes from 0..65535; mode I, which does not say its range, from 0..65535 unless
    nothing is above 255; mode F likewise, and from [0, 1] where nothing is above 1. ICC profiles are not applied.
    Arrays and tensors are uint8 in 0..255 or floats in [0, 1].

    Raises ImageError, and nothing else, for whatever cannot be read.
    """
    match image:
        case str() if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(?:data|file):", image):
            if (scheme[1] or "").lower() not in ("http", "https"):
                raise ImageError("only http and https URLs are fetched", source=_shortened(image))
            return _from_url(image)
        case str() | os.PathLike():
            return _from_path(Path(os.fsdecode(image)))
        case Strokes():
            return image
        case Image.Image():
            with _decoding(type(image).__name__):
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


def _from_path(path: Path) -> Image.Image | Strokes:
    if path.suffix.lower() == ".ndjson":
        raise ImageError(
            "a file of many drawings: give it to `extract`, or one of its lines to Strokes.from_quickdraw",
            source=str(path),
        )
    if path.suffix.lower() == ".svg":
        return Strokes.from_svg(path)
    try:
        with open(path, "rb") as file:
            return _decoded(file, str(path))
    except (OSError, ValueError) as error:  # from open itself; ValueError: a null byte in the path
        problem = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be read: {problem}", source=str(path)) from None


def _from_url(url: str) -> Image.Image | Strokes:
    data = _downloaded(url)
    if urllib.parse.urlsplit(url).path.lower().endswith(".svg"):
        try:
            return Strokes.from_svg(data)
        except ImageError as error:
            raise ImageError(error.problem, source=url) from None
    return _decoded(io.BytesIO(data), url)


def _downloaded(url: str) -> bytes:
    """The body of an http(s) URL. A thread does the work, as nothing else bounds the time that looking up a name
    or a dripping server may take; it is left behind where it is late, and ends at its next time-out.
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
