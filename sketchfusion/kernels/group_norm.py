"""Group norm, and the SiLU behind it where there is one, on channels-last maps: two reads and one write."""

# The operator's schema is read from the annotations, so they are not postponed here.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TRITON, usable


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Normalise `x` (N, C, H, W) over each group of channels, scale by `weight` (C,), add `bias` (C,).

    With `silu`, y * sigmoid(y) of the result. The kernels compute in float32 and return a channels-last map.
    """
    run = fused if usable(x) else reference
    return run(x, groups, weight, bias, eps, silu)


def reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """The same in torch, whose group norm on CUDA turns every map to contiguous first."""
    normed = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed, inplace=True) if silu else normed


if TRITON:
    import triton
    import triton.language as tl
    from torch.library import triton_op, wrap_triton

    # A tile of 4096 values is 64 rows of 128 bytes in half precision (the widths of Stable Diffusion are multiples of
    # 64): four 16-byte loads a thread. An image is cut into at most CHUNKS runs of whole tiles, a program each.
    PIXELS, CHANNELS, CHUNKS, WARPS = 64, 64, 512, 4
    PARTIALS = 1024  # of the chunks' results, so many at a time are merged

    @triton.jit
    def _measure(  # type: ignore[no-untyped-def]
        x,  # (N, pixels, C)
        means,  # (N, chunks, C), float32: of each channel in each chunk
        squares,  # the same: the sum of squared deviations from that mean
        pixels,
        C,
        chunk,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """Two passes within a tile; tiles merged by Chan, Golub and LeVeque's rule: no large squares are subtracted."""
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        start = tl.program_id(1) * chunk
        count = tl.minimum(pixels - start, chunk)
        origin = x + (tl.program_id(2).to(tl.int64) * pixels + start) * C
        mean, square = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
        for first in range(0, count, PIXELS):
            pixel = (first + tl.arange(0, PIXELS))[:, None]
            inside = (pixel < count) & (channel < C)[None, :]
            tile = tl.load(origin + pixel * C + channel[None, :], mask=inside, other=0).to(tl.float32)
            size = tl.minimum(count - first, PIXELS)
            tile_mean = tl.sum(tile, 0) / size
            deviation = tl.where(inside, tile - tile_mean[None, :], 0)
            step = tile_mean - mean
            share = size * 1.0 / (first + size)
            mean += step * share
            square += tl.sum(deviation * deviation, 0) + step * step * first * share
        place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * C + channel
        tl.store(means + place, mean, mask=channel < C)
        tl.store(squares + place, square, mask=channel < C)

    @triton.jit
    def _partials(first, pixels, C, chunk, chunks, width, PARTIALS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where the partial results `first`, `first` + 1, … of a group lie, which are there, and each one's pixels."""
        i = first + tl.arange(0, PARTIALS)
        inside = i < chunks * width
        size = tl.where(inside, tl.minimum(pixels - i // width * chunk, chunk), 0)
        return i // width * C + i % width, inside, size.to(tl.float32)

    @triton.jit
    def _merge(  # type: ignore[no-untyped-def]
        means,  # as above
        squares,
        mean,  # (N, groups), float32
        scale,  # the same: 1 / standard deviation
        pixels,
        C,
        chunk,
        chunks,
        groups,
        eps,
        PARTIALS: tl.constexpr,
    ):
        """A group's mean, then its variance about that mean."""
        width = C // groups
        offset = (tl.program_id(0) // groups).to(tl.int64) * chunks * C + tl.program_id(0) % groups * width
        total, count = tl.zeros([PARTIALS], tl.float32), tl.zeros([PARTIALS], tl.float32)
        for first in range(0, chunks * width, PARTIALS):
            place, inside, size = _partials(first, pixels, C, chunk, chunks, width, PARTIALS)
            total += size * tl.load(means + offset + place, mask=inside, other=0)
            count += size
        values = tl.sum(count)
        average = tl.sum(total) / values
        spread = tl.zeros([PARTIALS], tl.float32)
        for first in range(0, chunks * width, PARTIALS):
            place, inside, size = _partials(first, pixels, C, chunk, chunks, width, PARTIALS)
            deviation = tl.load(means + offset + place, mask=inside, other=0) - average
            spread += tl.load(squares + offset + place, mask=inside, other=0) + size * deviation * deviation
        tl.store(mean + tl.program_id(0), average)
        tl.store(scale + tl.program_id(0), 1 / tl.sqrt(tl.sum(spread) / values + eps))

    @triton.jit
    def _apply(  # type: ignore[no-untyped-def]
        x,  # (N, pixels, C)
        out,  # the same
        mean,  # (N, groups), float32
        scale,  # the same
        weight,  # (C,)
        bias,  # (C,)
        pixels,
        C,
        chunk,
        groups,
        SILU: tl.constexpr,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < C
        group = tl.program_id(2) * groups + channel // (C // groups)
        average = tl.load(mean + group, mask=known, other=0)
        factor = tl.load(scale + group, mask=known, other=0)
        factor *= tl.load(weight + channel, mask=known, other=0).to(tl.float32)
        shift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)

        start = tl.program_id(1) * chunk
        count = tl.minimum(pixels - start, chunk)
        origin = (tl.program_id(2).to(tl.int64) * pixels + start) * C
        for first in range(0, count, PIXELS):
            pixel = (first + tl.arange(0, PIXELS))[:, None]
            inside = (pixel < count) & known[None, :]
            place = origin + pixel * C + channel[None, :]
            tile = tl.load(x + place, mask=inside, other=0).to(tl.float32)
            y = (tile - average[None, :]) * factor[None, :] + shift[None, :]
            if SILU:
                y *= tl.sigmoid(y)
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)

    @triton_op("sketchfusion::group_norm", mutates_args={})
    def fused(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous()
        out = torch.empty_like(x, memory_format=torch.channels_last)
        n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        chunk = PIXELS * triton.cdiv(pixels, PIXELS * CHUNKS)
        chunks = triton.cdiv(pixels, chunk)
        means = torch.empty((n, chunks, channels), dtype=torch.float32, device=x.device)
        mean = torch.empty((n, groups), dtype=torch.float32, device=x.device)
        squares, scale = torch.empty_like(means), torch.empty_like(mean)
        grid = (triton.cdiv(channels, CHANNELS), chunks, n)
        tile = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
        with torch.cuda.device_of(x):  # Triton launches on the current device
            wrap_triton(_measure)[grid](x, means, squares, pixels, channels, chunk, **tile)
            wrap_triton(_merge)[(n * groups,)](
                means, squares, mean, scale, pixels, channels, chunk, chunks, groups, eps, PARTIALS
            )
            wrap_triton(_apply)[grid](x, out, mean, scale, weight, bias, pixels, channels, chunk, groups, silu, **tile)
        return out

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, groups, weight, bias, eps, silu = inputs
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = groups, eps, silu

    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Through the reference, recomputed: it is needed in training alone, and mostly with frozen weights."""
        groups, eps, silu = ctx.rest
        learn = (True, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        inputs = [tensor.detach().requires_grad_(asked) for tensor, asked in zip(ctx.saved_tensors, learn, strict=True)]
        with torch.enable_grad():
            x, weight, bias = inputs
            out = reference(x, groups, weight, bias, eps, silu)
        found = iter(torch.autograd.grad(out, [tensor for tensor in inputs if tensor.requires_grad], gradient))
        x, weight, bias = (next(found) if asked else None for asked in learn)
        return x, None, weight, bias, None, None

    fused.register_autograd(_backward, setup_context=_keep)
