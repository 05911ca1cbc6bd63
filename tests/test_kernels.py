"""The Triton kernels against their torch references in float64.

On CUDA they run as they are. Everywhere Triton is installed they run under its interpreter, in a process of its own:
the interpreter has to be chosen before triton is imported, and is too slow for the other tests.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import write_diffusion, write_semantic
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sketchfusion import SketchFusion, kernels
from sketchfusion.fusion.aggregation import Aggregator
from sketchfusion.kernels import group_norm, injection

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
CUDA = torch.cuda.is_available() and not kernels.INTERPRETED

runs_kernels = pytest.mark.skipif(
    not kernels.INTERPRETED and not (CUDA and kernels.TRITON),
    reason="no CUDA with Triton; test_under_the_interpreter runs it on the CPU",
)
needs_cuda = pytest.mark.skipif(
    not (CUDA and kernels.TRITON), reason="needs CUDA with Triton: its interpreter is neither traced nor captured"
)
few = settings(max_examples=10, deadline=None)  # the interpreter is slow
sides = st.integers(1, 9)
dtypes = st.sampled_from(kernels.DTYPES)
layouts = st.sampled_from(["contiguous", "channels_last", "sliced"])


def draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Normal values of a layout; sliced are channels of a wider channels-last map."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, h, w = shape
    wider = torch.randn(n, channels + 3, h, w, generator=generator).to(DEVICE, dtype)
    if layout == "sliced":
        return wider.contiguous(memory_format=torch.channels_last)[:, 2 : 2 + channels]
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return wider[:, :channels].contiguous(memory_format=formats[layout])


def assert_rounded_once(found: Tensor, expected: Tensor, absolute: float) -> None:
    """`found` is the float64 result rounded to its dtype, but for float32's own errors."""
    assert expected.dtype == torch.float64
    ulps = 1 if kernels.INTERPRETED and found.dtype == torch.bfloat16 else 0.51  # the interpreter cuts bfloat16 off
    relative = ulps * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=absolute)
    assert found.is_contiguous(memory_format=torch.channels_last)


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of what `run` returns."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = run(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    return torch.autograd.grad(out, leaves, weights)


def norm(weight: Tensor, bias: Tensor, groups: int, silu: bool, double: bool = False) -> Callable[[Tensor], Tensor]:
    if double:
        return lambda x: group_norm.reference(x.double(), groups, weight.double(), bias.double(), 1e-5, silu)
    return lambda x: group_norm.group_norm(x, groups, weight, bias, 1e-5, silu)


# ---- injection


@runs_kernels
@few
@given(st.integers(1, 2), st.sampled_from([1, 5, 64, 70]), sides, sides, sides, sides, dtypes, layouts, layouts)
def test_injection(
    n: int, channels: int, h: int, w: int, t: int, u: int, dtype: torch.dtype, one: str, other: str
) -> None:
    hidden, addition = draw(0, (n, channels, h, w), dtype, one), draw(1, (n, channels, t, u), dtype, other)
    assert kernels.usable(hidden)
    expected = injection.reference(hidden.double(), addition.double())
    assert_rounded_once(injection.inject(hidden, addition), expected, 2e-6)


@runs_kernels
@pytest.mark.parametrize(("size", "grid"), [((32, 32), (24, 24)), ((8, 8), (24, 24)), ((13, 7), (24, 16))])
def test_injection_at_the_sizes_of_a_unet(size: tuple[int, int], grid: tuple[int, int]) -> None:
    hidden, addition = draw(0, (1, 3, *size), torch.float32), draw(1, (1, 3, *grid), torch.float32)
    expected = injection.reference(hidden.double(), addition.double())
    assert_rounded_once(injection.inject(hidden, addition), expected, 2e-6)


@runs_kernels
@pytest.mark.parametrize("shape", [(1, 8, 3, 3), (2, 4, 3, 3)])
def test_an_injection_of_other_images_or_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images and channels"):
        injection.inject(draw(0, (2, 8, 5, 5), torch.float32), draw(1, shape, torch.float32))


@runs_kernels
@few
@given(sides, sides, sides, sides, dtypes)
def test_gradients_of_injection(h: int, w: int, t: int, u: int, dtype: torch.dtype) -> None:
    inputs = [draw(0, (2, 3, h, w), dtype), draw(1, (2, 3, t, u), dtype, "channels_last")]
    found = gradients(injection.inject, inputs)
    expected = gradients(injection.reference, [tensor.double() for tensor in inputs])
    # The weights of the sum were rounded to the dtype; a cell sums as many of them as the map has pixels.
    relative = torch.finfo(dtype).eps
    for one, other, of in zip(found, expected, inputs, strict=True):
        assert one.dtype == of.dtype
        torch.testing.assert_close(one.double(), other, rtol=relative, atol=max(1e-5, relative * h * w / min(t, u)))


@few
@given(sides, sides, sides, sides)
def test_the_adjoint_of_the_resize(h: int, w: int, t: int, u: int) -> None:
    tokens, gradient = torch.randn(2, 3, t, u), torch.randn(2, 3, h, w)
    resized = injection.reference(torch.zeros(2, 3, h, w, dtype=torch.float64), tokens.double())
    found = injection.adjoint(gradient, (t, u)).double() * tokens
    torch.testing.assert_close((resized * gradient).sum(), found.sum(), rtol=0, atol=1e-4)


@runs_kernels
def test_the_hidden_map_is_not_written_to_and_float64_takes_the_reference() -> None:
    hidden, addition = draw(0, (1, 4, 5, 5), torch.float32, "channels_last"), draw(1, (1, 4, 3, 3), torch.float32)
    before = hidden.clone()
    injection.inject(hidden, addition)
    assert torch.equal(hidden, before)
    assert torch.equal(
        injection.inject(hidden.double(), addition.double()),
        injection.reference(hidden.double(), addition.double()),
    )


# ---- group norm


@runs_kernels
@few
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 2), (2, 5), (4, 3), (3, 24)]),
    st.integers(1, 14),
    st.integers(1, 14),
    st.sampled_from([1, 2, 512]),
    dtypes,
    layouts,
    st.booleans(),
)
def test_group_norm(
    n: int,
    channels: tuple[int, int],
    h: int,
    w: int,
    chunks: int,
    dtype: torch.dtype,
    layout: str,
    silu: bool,
) -> None:
    groups, width = channels
    x = draw(0, (n, groups * width, h, w), dtype, layout) + 2
    weight, bias = draw(1, (groups * width, 2, 1, 1), dtype).flatten(1).unbind(1)
    assert kernels.usable(x)
    with patch.object(group_norm, "CHUNKS", chunks):  # one: every tile of an image is merged in one program
        found = norm(weight, bias, groups, silu)(x)
    assert_rounded_once(found, norm(weight, bias, groups, silu, double=True)(x), 2e-5)


@runs_kernels
@pytest.mark.parametrize("chunks", [1, 512])
def test_group_norm_far_from_zero(chunks: int) -> None:
    """Where the mean is 10,000 standard deviations, the difference of two squares in float32 has no digit left."""
    x = 10_000 + draw(0, (1, 2, 13, 14), torch.float32)
    weight, bias = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    with patch.object(group_norm, "CHUNKS", chunks):
        found = norm(weight, bias, 1, silu=False)(x)
    # The mean itself is rounded to 1e-3, and what a GPU divides by a little more.
    assert_rounded_once(found, norm(weight, bias, 1, silu=False, double=True)(x), 4e-3)


@runs_kernels
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_group_norm(dtype: torch.dtype, silu: bool) -> None:
    x, affine = draw(0, (2, 6, 5, 7), dtype, "channels_last"), draw(1, (2, 6, 1, 1), dtype).flatten(1)
    inputs = [x, affine[0], affine[1]]
    found = gradients(lambda x, w, b: group_norm.group_norm(x, 3, w, b, 1e-5, silu), inputs)
    expected = gradients(
        lambda x, w, b: group_norm.reference(x, 3, w, b, 1e-5, silu), [tensor.double() for tensor in inputs]
    )
    for one, other in zip(found, expected, strict=True):
        bound = float(8 * torch.finfo(dtype).eps * other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=max(bound, 1e-5))


@runs_kernels
def test_the_aggregators_maps_stay_channels_last() -> None:
    torch.manual_seed(0)
    aggregator = Aggregator({"up0": 8, "up1": 16}, width=16, grid=6, groups=4).to(DEVICE)
    maps = {"up0": draw(0, (2, 8, 3, 3), torch.float32, "channels_last")}
    maps["up1"] = draw(1, (2, 16, 8, 8), torch.float32, "channels_last")
    with patch.object(group_norm, "fused", wraps=group_norm.fused) as fused, torch.no_grad():
        dense = aggregator(maps)
    assert fused.call_count == 7  # three a bottleneck, and one where the width changes
    assert dense.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = aggregator({tap: found.double() for tap, found in maps.items()})
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_frozen_group_norms_cost_no_gradients_of_their_weights() -> None:
    x, affine = draw(0, (2, 6, 5, 7), torch.float32, "channels_last").requires_grad_(), torch.rand(2, 6, device=DEVICE)
    out = group_norm.group_norm(x, 3, affine[0], affine[1], 1e-5, True)
    with patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as grad:
        out.square().sum().backward()
    ((_, learned, _),) = [call.args for call in grad.call_args_list]
    assert [tensor.shape for tensor in learned] == [x.shape]
    again = x.detach().double().requires_grad_()
    group_norm.reference(again, 3, *affine.double(), 1e-5, True).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-4, atol=1e-4)


# ---- the whole model


@runs_kernels
def test_the_model_gives_the_same_with_them(tmp_path: Path) -> None:
    diffusion, semantic = write_diffusion(tmp_path / "diffusion"), write_semantic(tmp_path / "semantic")
    sizes = {"aggregator_width": 32, "aggregator_grid": 12}
    model = SketchFusion.from_backbones(diffusion, semantic, dtype="float32", device=DEVICE, **sizes)
    torch.manual_seed(0)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    photo = Path(__file__).parents[1] / "examples" / "images" / "cat.jpg"
    found = model.encode(photo).dense
    with patch.object(kernels, "TRITON", False):
        expected = model.encode(photo).dense
    # Where a GPU's convolutions round to TF32, what is rounded is not the same to the last bit.
    assert (found - expected).norm() < (1e-5 if kernels.INTERPRETED else 1e-2) * expected.norm()
    assert not torch.equal(found, expected)


# ---- where they run


@pytest.mark.skipif(kernels.INTERPRETED, reason="not here")
@pytest.mark.skipif(find_spec("triton") is None, reason="no triton: the references are all there is")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_debians_python_has_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside a virtual environment its first scheme is where pip installs; Triton takes the headers of the other."""
    (tmp_path / "Python.h").touch()
    schemes = {"posix_local": tmp_path / "local", "posix_prefix": tmp_path}
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(kernels.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda scheme: {"include": str(schemes[scheme])})
    assert kernels._found()
    (tmp_path / "Python.h").unlink()
    assert not kernels._found()


WITHOUT = """
import sys, warnings
if sys.argv[1] == "hidden":
    sys.modules["triton"] = None
import torch, torch.nn.functional as F
warnings.simplefilter("error")
before = set(sys.modules)
from sketchfusion import kernels
from sketchfusion.kernels.group_norm import group_norm
from sketchfusion.kernels.injection import inject
assert not kernels.TRITON
assert not any(name.split(".")[0] == "triton" for name in set(sys.modules) - before)
x, y, w = torch.randn(2, 8, 5, 7), torch.randn(2, 8, 3, 3), torch.rand(8)
assert torch.equal(inject(x, y), x + F.interpolate(y, size=(5, 7), mode="bilinear"))
assert torch.equal(group_norm(x, 2, w, w, 1e-5, True), F.silu(F.group_norm(x, 2, w, w, 1e-5)))
"""


@pytest.mark.skipif(kernels.INTERPRETED, reason="not here")
@pytest.mark.parametrize("triton", ["hidden", "installed"])
def test_without_triton_the_references_run_and_nothing_warns(triton: str) -> None:
    if triton == "installed" and torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA, where the kernels are what runs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, triton], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- compiled, captured


def injected(x: Tensor) -> Tensor:
    return injection.inject(x, x[:, :, ::2, 1:]) * 2


def normed(x: Tensor) -> Tensor:
    return norm(x[0, :, 0, 0], x[0, :, 1, 1], 4, silu=True)(x) * 2


@needs_cuda
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_operators_are_what_torch_asks_of_operators(dtype: torch.dtype) -> None:
    hidden, addition = draw(0, (2, 32, 9, 6), dtype), draw(1, (2, 32, 5, 7), dtype)
    torch.library.opcheck(injection.fused, (hidden, addition.requires_grad_()))
    x, weight = draw(0, (2, 32, 9, 6), dtype, "channels_last"), draw(1, (1, 32, 1, 1), dtype).flatten()
    torch.library.opcheck(group_norm.fused, (x, 8, weight, weight, 1e-5, True))
    torch.library.opcheck(group_norm.fused, (x.clone().requires_grad_(), 8, weight, weight, 1e-5, False))


@needs_cuda
@pytest.mark.parametrize("run", [injected, normed])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_the_same(run: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for size in ((6, 10), (16, 12)):
        x = draw(0, (2, 32, *size), torch.float32)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(compiled, [x]), gradients(run, [x]), rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("run", [injected, normed])
def test_captured_in_a_cuda_graph_is_the_same(run: Callable[[Tensor], Tensor]) -> None:
    x, other = draw(0, (2, 32, 8, 8), torch.float16), draw(1, (2, 32, 8, 8), torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(other)
    graph.replay()
    assert torch.equal(out, run(other))


@needs_cuda
def test_gradients_are_deterministic() -> None:
    inputs = [draw(0, (2, 64, 32, 32), torch.float16), draw(1, (2, 64, 24, 24), torch.float16)]
    first, again = (gradients(injection.inject, inputs)[1] for _ in range(2))
    assert torch.equal(first, again)


@needs_cuda
def test_more_values_than_32_bits_count() -> None:
    x = torch.randn(17, 128, 1024, 1024, dtype=torch.float16, device=DEVICE).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.ones(128, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(norm(weight, weight, 32, silu=True)(x)[-1:], norm(weight, weight, 32, silu=True)(x[-1:]))
    tokens = draw(1, (17, 128, 24, 24), torch.float16)
    torch.testing.assert_close(injection.inject(x, tokens)[-1:], injection.inject(x[-1:], tokens[-1:]))


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("run", [injected, normed])
def test_on_a_device_that_is_not_the_current_one(run: Callable[[Tensor], Tensor]) -> None:
    x = draw(0, (2, 32, 8, 8), torch.float32)
    torch.testing.assert_close(run(x.to("cuda:1")).cpu(), run(x).cpu())
