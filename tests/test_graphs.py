"""The whole encode as one CUDA graph: what can be known of it without a GPU, and on one that it changes nothing."""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from sketchfusion import Features, SketchFusion, SketchFusionError
from sketchfusion.graphs import LIMIT, Captured, Graphs, NotCapturable, OnDevice
from sketchfusion.images import Geometry, collate

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: a graph is captured on a GPU")
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six of different shapes."""
    paths = []
    for i in range(6):
        noise = torch.randint(256, (20 + 8 * i, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(noise.numpy()).save(paths[-1])
    return paths


# ---- without a GPU


class Replayed:
    """Stands in for a graph: computes anew from the memory it was captured with, into the memory it wrote to."""

    def __init__(self, function: Any, inputs: list[Tensor], outputs: tuple[Tensor, ...]):
        self.function, self.inputs, self.outputs = function, inputs, outputs

    def replay(self) -> None:
        for kept, found in zip(self.outputs, self.function(*self.inputs), strict=True):
            kept.copy_(found)


class Stream:
    waited: ClassVar[list[Any]] = []

    def __init__(self, device: Any = CPU, priority: int = 0):
        self.device, self.priority = device, priority

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Graphs on the CPU, with a stand-in for what only CUDA does."""

    def capture(self: Graphs, function: Any, inputs: Any, device: torch.device) -> tuple[Captured, Any]:
        held = [value.clone() for value in inputs]
        outputs = function(*held)
        replayed: Any = Replayed(function, held, outputs)
        return Captured(replayed, held, outputs), tuple(output.clone() for output in outputs)

    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return Graphs()


def captured(graphs: Graphs) -> list[Any]:
    return [key for key, known in graphs._known.items() if known is not None]


def test_the_second_call_is_captured_and_later_ones_replay_it(graphs: Graphs) -> None:
    ran = []

    def double(x: Tensor) -> tuple[Tensor, ...]:
        ran.append(x)
        return (2 * x,)

    results = []
    for i in range(4):
        (found,) = graphs.run("key", double, [torch.tensor([float(i)])], CPU)
        assert captured(graphs) == (["key"] if i else [])
        results.append(found)
    assert [r.item() for r in results] == [0, 2, 4, 6], "a result is a copy, which the next replay leaves alone"
    assert ran[2] is ran[3], "what is replayed reads the memory that was captured"


def test_the_key_used_longest_ago_makes_room(graphs: Graphs) -> None:
    def same(x: Tensor) -> tuple[Tensor, ...]:
        return (x.clone(),)

    for key in range(LIMIT):
        for _ in range(2):
            graphs.run(key, same, [torch.ones(1)], CPU)
    graphs.run(0, same, [torch.ones(1)], CPU)
    graphs.run("new", same, [torch.ones(1)], CPU)
    assert captured(graphs) == [*range(2, LIMIT), 0]
    graphs.clear()
    assert not graphs._known


def test_what_cannot_be_captured_runs_as_it_is_written(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def refuse(*_: Any) -> Captured:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", refuse)
    for i in range(4):
        (found,) = graphs.run("key", lambda x: (x + 1,), [torch.tensor([float(i)])], CPU)
        assert found.item() == i + 1
    assert len(attempts) == 1


def test_a_replay_waits_for_the_one_before(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write into the same memory, whatever the streams of their callers."""
    monkeypatch.setattr(Stream, "waited", [])
    for _ in range(4):
        graphs.run("key", lambda x: (x + 1,), [torch.ones(1)], CPU)
        waited = len(Stream.waited)
    assert waited == 1


def test_a_shape_counts_as_seen_once_it_has_run(graphs: Graphs) -> None:
    """Another thread would capture what the first run has yet to make: noises, kernels."""

    def overlapped(x: Tensor) -> tuple[Tensor, ...]:
        graphs.run("key", lambda x: (x + 1,), [torch.ones(1)], CPU)  # as from another thread
        return (x + 1,)

    graphs.run("key", overlapped, [torch.ones(1)], CPU)
    assert captured(graphs) == []
    graphs.run("key", lambda x: (x + 1,), [torch.ones(1)], CPU)
    assert captured(graphs) == ["key"]


def test_a_capture_is_on_a_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may have been on another before, whose stream records nothing of what is done on this."""
    streams = []

    def graph(graph: Any, *, stream: Any, **_: Any) -> Any:
        streams.append(stream)
        return nullcontext()

    stand_ins = {
        "graph": graph, "Stream": Stream, "device": lambda device: nullcontext(), "stream": lambda s: nullcontext(),
        "current_stream": lambda device: Stream(device), "graph_pool_handle": object, "CUDAGraph": object,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs, devices = Graphs(), [CPU, torch.device("meta")]  # which stand for two GPUs
    for device in devices:
        for key in ("first", "second"):
            for _ in range(2):
                graphs.run(key, lambda x: (x + 1,), [torch.ones(1, device=device)], device)
        graphs.clear()
    assert [stream.device for stream in streams] == [CPU, CPU, *devices[1:] * 2]
    assert streams[0] is streams[1]
    assert {stream.priority for stream in streams} == {-1}, "no copy of another thread's is on it"


def test_a_copy_captures_its_own(graphs: Graphs) -> None:
    for _ in range(2):
        graphs.run("key", lambda x: (x + 1,), [torch.ones(1)], CPU)
    assert captured(graphs) == ["key"]
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert captured(copied) == []


@pytest.mark.parametrize("function", [lambda x: x * x.sum().item(), torch.nonzero, lambda x: x + torch.zeros(3)])
def test_what_reads_a_value_back_or_lies_elsewhere_is_not_captured(function: Any) -> None:
    with pytest.raises(NotCapturable), OnDevice(torch.device("meta")):
        function(torch.ones(3, device="meta"))


torch.library.define("probe::attention", "(Tensor x) -> (Tensor, Tensor)", tags=())
torch.library.impl("probe::attention", ["Meta"])(lambda x: (torch.empty_like(x), torch.empty((), device="cpu")))


def test_the_random_state_of_attention_does_not_count() -> None:
    """Outside of a capture, memory-efficient attention returns its own on the CPU."""
    with OnDevice(torch.device("meta")):
        attended, seed = torch.ops.probe.attention(torch.ones(3, device="meta"))
        with pytest.raises(NotCapturable):
            attended + seed.expand(3)


def test_a_graph_is_known_by_all_that_it_depends_on(model: SketchFusion) -> None:
    shape, keys = torch.Size((1, 3, 64, 64)), []

    def changed() -> None:
        keys.append(model._graph_key(shape, 2, 8))
        assert len(set(keys)) == len(keys)

    changed()
    assert model._graph_key(shape, 2, 8) == keys[0]
    keys.extend((model._graph_key(torch.Size((2, 3, 64, 64)), 2, 8), model._graph_key(shape, 1, 8)))
    keys.append(model._graph_key(shape, 2, 4))
    for part in (model, model.diffusion, model.semantic):
        part.to("cpu")
        changed()
    model.aggregator.mixing_weights = torch.nn.Parameter(model.aggregator.mixing_weights.detach().clone())
    changed()
    model.semantic = copy.deepcopy(model.semantic).to("cpu")  # another network in the place of the first
    changed()
    model.unfold()
    changed()


def test_noises_go_where_the_weights_go(model: SketchFusion) -> None:
    model.encode(Image.new("RGB", (64, 64)), ensemble=4)
    assert len(model.diffusion._noises) == 2
    model.to("meta")
    assert not model.diffusion._noises


def test_short_of_memory_graphs_go_before_a_batch_is_halved(
    graphs: Graphs, model: SketchFusion, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, launch = [], SketchFusion._launch

    def cramped(self: SketchFusion, items: list, *rest: Any) -> Any:
        sizes.append(len(items))
        if len(items) > 2 or captured(graphs):
            raise torch.OutOfMemoryError("simulated")
        return launch(self, items, *rest)

    for _ in range(2):
        graphs.run("key", lambda x: (x + 1,), [torch.ones(1)], CPU)
    monkeypatch.setattr(model, "_graphs", graphs)
    monkeypatch.setattr(SketchFusion, "_launch", cramped)
    assert len(model.encode(images[:4], batch_size=4)) == 4
    assert sizes == [4, 4, 2, 2]
    assert not captured(graphs)


def test_compiling_changes_nothing(model: SketchFusion, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it lost where the diffusion backbone is loaded again."""
    expected, compiled = model.encode(images[0]).dense, []
    real = torch.compile

    def spied(function: Any, **settings: Any) -> Any:
        compiled.append(function)
        return real(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", spied)
    model._compile()
    count = len(compiled)
    assert count == 1 + len(model.diffusion.blocks())
    assert torch.allclose(model.encode(images[0]).dense, expected, atol=1e-4)
    model.unfold()
    assert len(compiled) == 2 * count
    assert torch.allclose(model.encode(images[0]).dense, expected, atol=1e-4)


@pytest.mark.parametrize("ensemble", [1, 4])
def test_nothing_is_waited_for_from_the_cpu(model: SketchFusion, ensemble: int) -> None:
    """A graph holds what was queued on the device: a value from the CPU, or one read back, cannot be in it.

    On the meta device nothing is computed, and reading a value raises; so this is the real computation's course.
    """
    there = copy.deepcopy(model).to("meta")
    size = model.config.diffusion.image_size
    pixels = torch.empty(2, 3, size, size, device="meta")
    geometry = Geometry(*torch.empty(len(Geometry._fields), 2, dtype=torch.int64, device="meta"))
    with pytest.raises(NotCapturable, match="randn"), OnDevice(there.device):  # draws the noise
        there._infer(pixels, geometry, ensemble=ensemble, rows=8)
    there._infer(pixels, geometry, ensemble=ensemble, rows=8)
    with OnDevice(there.device):
        pooled, dense, finite = there._infer(pixels, geometry, ensemble=ensemble, rows=8)
    assert pooled.device.type == dense.device.type == finite.device.type == "meta"


def test_batches_that_run_ahead_come_in_order(
    model: SketchFusion, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.encode(images, batch_size=2)
    launched = []
    launch = SketchFusion._launch

    def counted(self: SketchFusion, items: list, *rest: Any) -> Any:
        launched.append(len(items))
        return launch(self, items, *rest)

    monkeypatch.setattr(SketchFusion, "_launch", counted)
    monkeypatch.setattr(SketchFusion, "_batches_ahead", 1)
    first = next(stream := model.stream(images, batch_size=2))
    assert launched == [2, 2], "the second batch runs while the first is handed out"
    rest = list(stream)
    assert launched == [2] * (len(images) // 2)
    for found, wanted in zip([first, *rest], (expected[i : i + 2] for i in range(0, len(images), 2)), strict=True):
        assert torch.equal(found.dense, wanted.dense)
        assert torch.equal(found.pooled, wanted.pooled)

    # Whoever makes the images one by one gets the features of a batch before the next is asked for.
    launched.clear()
    next(model.stream(iter(images), batch_size=2))
    assert launched == [2]


def test_an_image_that_is_refused_comes_after_the_batches_that_run(
    model: SketchFusion, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SketchFusion, "_batches_ahead", 1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    found = []
    with pytest.raises(SketchFusionError, match="broken") as raised:
        found.extend(model.stream([*images[:3], broken], batch_size=1))
    assert len(found) == 3
    assert raised.value.index == 3


# ---- on a GPU


@pytest.fixture(params=["float16", "float32"])  # which attend by different kernels
def gpu_model(request: pytest.FixtureRequest, model: SketchFusion) -> SketchFusion:
    return model.to("cuda", getattr(torch, request.param))


def written(model: SketchFusion, image: Path, **options: Any) -> Features:
    """The features as they are computed without a graph."""
    pixels, geometry = model.preprocess(image)
    with torch.no_grad():
        return model(pixels[None], collate([geometry]), **options)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() < 1e-2 * expected.float().norm())


@needs_cuda
def test_a_graph_gives_what_is_written(gpu_model: SketchFusion, images: list[Path]) -> None:
    for ensemble in (1, 2):
        kept = [gpu_model.encode(image, ensemble=ensemble) for image in images]
        for features, image in zip(kept, images, strict=True):
            expected = written(gpu_model, image, ensemble=ensemble)
            assert close(features.dense, expected.dense[0])
            assert close(features.pooled, expected.pooled[0])
    assert len(captured(gpu_model._graphs)) == 2


@needs_cuda
def test_a_graph_sees_what_training_changes(gpu_model: SketchFusion, images: list[Path]) -> None:
    for _ in range(3):
        before = gpu_model.encode(images[0])
    with torch.no_grad():
        for parameter in gpu_model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = gpu_model.encode(images[0])
    assert not close(after.dense, before.dense)
    assert close(after.dense, written(gpu_model, images[0]).dense[0])
    gpu_model.to("cpu").to("cuda")
    for _ in range(3):
        assert close(gpu_model.encode(images[0]).dense, after.dense)
    assert captured(gpu_model._graphs)


@needs_cuda
def test_what_reads_back_runs_on_and_breaks_nothing() -> None:
    graphs, device = Graphs(), torch.device("cuda", 0)

    def reads(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x.sum().item(),)

    for _ in range(3):
        assert graphs.run("reads", reads, [torch.ones(3)], device)[0].tolist() == [3, 3, 3]
    torch.cuda.empty_cache()
    for _ in range(3):
        assert graphs.run("adds", lambda x: (x + 1,), [torch.ones(3)], device)[0].tolist() == [2, 2, 2]
    assert captured(graphs) == ["adds"]


@needs_cuda
def test_batches_from_the_gpu_are_in_order_and_in_plain_memory(gpu_model: SketchFusion, images: list[Path]) -> None:
    many = images * 6
    features = gpu_model.encode(many, batch_size=4)
    assert len(features) == len(many)
    assert not features.dense.is_pinned()
    for i, image in enumerate(many):
        assert close(features.dense[i], written(gpu_model, image).dense[0].cpu())
    assert not any(batch.dense.is_pinned() for batch in gpu_model.stream(images, batch_size=2))
