"""Injection: resize the adapter's token map bilinearly and add it to a block's output, in one pass over memory."""

# The operator's schema is read from the annotations, so they are not postponed here.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import TRITON, usable


def inject(hidden: Tensor, addition: Tensor) -> Tensor:
    """Add `addition` (N, C, t, u), resized bilinearly, to a block's output `hidden` (N, C, h, w).

    Out of place: whether the block's last skip sees the sum as well is the UNet loop's decision. The kernel computes
    in float32 and returns a channels-last map.
    """
    return fused(hidden, addition) if usable(hidden) else reference(hidden, addition)


def reference(hidden: Tensor, addition: Tensor) -> Tensor:
    """The same in torch: two passes, and a rounding of the resized map in between."""
    resized = F.interpolate(addition, size=hidden.shape[-2:], mode="bilinear", align_corners=False)
    return hidden + resized.to(hidden.dtype)


def adjoint(gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """Adjoint of the resize from `size` (t, u): gradient (N, C, h, w) -> (N, C, t, u), in float32.

    The resize is one linear map a dimension, so its adjoint is two matrix products: no atomics, always the same sum.
    """
    rows, columns = (
        F.interpolate(torch.eye(source, device=gradient.device)[None], size=target, mode="linear")[0]
        for source, target in zip(size, gradient.shape[-2:], strict=True)
    )
    return torch.einsum("ty,ncyx,ux->nctu", rows, gradient.float(), columns)


if TRITON:
    import triton
    import triton.language as tl
    from torch.library import triton_op, wrap_triton

    # A tile of 4096 values is 64 rows of 128 bytes in half precision (the widths of Stable Diffusion are multiples of
    # 64): four 16-byte loads a thread and corner. Neighbouring rows share their tokens.
    PIXELS, CHANNELS, WARPS = 64, 64, 4

    @triton.jit
    def _source(i, source, target):  # type: ignore[no-untyped-def]
        """The two cells that cell i of `target` lies between, and the share of the second.

        Cell centres fall on (i + 1/2) * source / target - 1/2, at least 0: a fraction over 2 * target, taken exactly.
        """
        numerator = tl.maximum((2 * i + 1) * source - target, 0)
        low = numerator // (2 * target)
        share = (numerator - low * 2 * target).to(tl.float32) / (2 * target)
        return low, tl.minimum(low + 1, source - 1), share

    @triton.jit
    def _inject(  # type: ignore[no-untyped-def]
        out,  # (rows, C), rows = N * h * w: a channels-last map
        hidden,  # the same
        addition,  # (N, t, u, C) with the strides below; channels lie side by side
        rows,
        C,
        h,
        w,
        t,
        u,
        stride_n,
        stride_t,
        stride_u,
        PIXELS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        blocks = tl.cdiv(C, CHANNELS)
        row = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
        channel = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        inside = (row < rows)[:, None] & (channel < C)

        t0, t1, down = _source(row // w % h, t, h)
        u0, u1, right = _source(row % w, u, w)
        image = addition + (row // (h * w)).to(tl.int64) * stride_n
        above, below = image + t0 * stride_t, image + t1 * stride_t
        a = tl.load((above + u0 * stride_u)[:, None] + channel, mask=inside, other=0).to(tl.float32)
        b = tl.load((above + u1 * stride_u)[:, None] + channel, mask=inside, other=0).to(tl.float32)
        c = tl.load((below + u0 * stride_u)[:, None] + channel, mask=inside, other=0).to(tl.float32)
        d = tl.load((below + u1 * stride_u)[:, None] + channel, mask=inside, other=0).to(tl.float32)
        down, right = down[:, None], right[:, None]
        resized = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)

        place = row.to(tl.int64)[:, None] * C + channel
        total = tl.load(hidden + place, mask=inside, other=0).to(tl.float32) + resized
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)

    @triton_op("sketchfusion::inject", mutates_args={})
    def fused(hidden: Tensor, addition: Tensor) -> Tensor:
        n, channels, h, w = hidden.shape
        t, u = addition.shape[-2:]
        if addition.shape[:2] != hidden.shape[:2]:  # the kernel would read beyond its end
            raise ValueError(f"{tuple(addition.shape)} is not of the images and channels of {tuple(hidden.shape)}")
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        if addition.stride(1) != 1:
            addition = addition.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(hidden, memory_format=torch.channels_last)
        rows = n * h * w
        grid = (triton.cdiv(rows, PIXELS) * triton.cdiv(channels, CHANNELS),)
        strides = addition.stride(0), addition.stride(2), addition.stride(3)
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            wrap_triton(_inject)[grid](
                out, hidden, addition, rows, channels, h, w, t, u, *strides, PIXELS, CHANNELS, num_warps=WARPS
            )
        return out

    def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, addition = inputs
        ctx.size, ctx.dtype = addition.shape[-2:], addition.dtype

    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        return gradient, adjoint(gradient, ctx.size).to(ctx.dtype) if ctx.needs_input_grad[1] else None

    fused.register_autograd(_backward, setup_context=_keep)
