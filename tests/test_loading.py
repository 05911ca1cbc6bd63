"""Loading, saving and pushing through the real Hub client, diffusers and transformers, against a Hub on loopback."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TOKENS, make_convolutional, write_diffusion
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from hub_server import REFUSALS, HubServer
from huggingface_hub import ModelCard, constants, file_download
from huggingface_hub.utils import _http
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModel, ViTConfig, ViTModel

from sketchfusion import ConfigError, Features, LoadError, SketchFusion, SketchFusionError
from sketchfusion.backbones.diffusion import make_null_prompt
from sketchfusion.config import CLIP_MEAN
from sketchfusion.data import DataSet, Record
from sketchfusion.hub import MIRRORS, Location
from sketchfusion.loading import resolve_dtype
from sketchfusion.tasks.recognition import Recognition
from sketchfusion.training.checkpoints import load_head, save_head

DIFFUSION, SEMANTIC, CHECKPOINT = "someone/diffusion", "someone/vision", "someone/checkpoint"
WEIGHTS = {
    "checkpoint": f"{CHECKPOINT}/resolve/{{}}/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "semantic": f"{SEMANTIC}/resolve/{{}}/model.safetensors",
}
REPOSITORY = {"checkpoint": CHECKPOINT, "vae": DIFFUSION, "unet": DIFFUSION, "semantic": SEMANTIC}
PLAIN: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
SMALL: dict[str, Any] = PLAIN | {"aggregator_width": 32, "aggregator_grid": 12}
MEANS: dict[str, Any] = {"semantic_mean": [0.4, 0.5, 0.6], "semantic_std": [0.2, 0.25, 0.3]}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def load(source: str | Path = CHECKPOINT, **arguments: Any) -> SketchFusion:
    return SketchFusion.from_pretrained(source, **PLAIN | arguments)


def build(diffusion: Any, semantic: Any, **arguments: Any) -> SketchFusion:
    return SketchFusion.from_backbones(diffusion, semantic, **SMALL | arguments)


def features(model: SketchFusion) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="UNTRAINED")
        dense = model.encode(PICTURE).dense
    assert isinstance(dense, Tensor)
    return dense


def same(a: SketchFusion, b: SketchFusion) -> bool:
    """Not to the last bit, which depends on where in memory the weights lie."""
    first, second = features(a), features(b)
    return bool((first - second).norm() < 1e-5 * second.norm())


def refused(action: Callable[[], object], *parts: str) -> str:
    """`action` ends in one LoadError of one line that contains every one of `parts`; the line."""
    with pytest.raises(LoadError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; a dictionary is merged."""
    old = json.loads(path.read_text())
    merged = {key: old.get(key, {}) | value if isinstance(value, dict) else value for key, value in values.items()}
    path.write_text(json.dumps(old | merged))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where others use the machine, and these models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def naps() -> list[float]:
    """How long the client waited before it tried again, in seconds; nobody really waits."""
    return []


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbones: dict[str, Path], naps: list[float]
) -> Iterator[HubServer]:
    """A Hub with both backbones, which this process takes for the real one, and an empty cache."""
    with HubServer() as server:
        server.publish(DIFFUSION, backbones["diffusion"])
        server.publish(SEMANTIC, backbones["semantic"])
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in (file_download, _http):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=naps.append))
        yield server


@pytest.fixture
def published(hub: HubServer, model: SketchFusion, tmp_path: Path) -> Path:
    """CHECKPOINT on the Hub, whose config.json names the two backbones there; the same files in a folder."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    origins = {"diffusion": DIFFUSION, "semantic": SEMANTIC}
    sources = {
        name: {"source": repo, "revision": hub.repositories[repo].refs["main"]} for name, repo in origins.items()
    }
    edit(folder / "config.json", **sources)
    hub.publish(CHECKPOINT, folder)
    return folder


@pytest.fixture
def parts(backbones: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Both backbones in folders that may be written to."""
    return {name: shutil.copytree(path, tmp_path / "parts" / name) for name, path in backbones.items()}


# ---- from the Hub


def test_the_hub_and_the_folder_are_one(published: Path, hub: HubServer, model: SketchFusion) -> None:
    from_hub = load()
    assert same(from_hub, load(published))
    assert torch.allclose(features(from_hub), features(model), rtol=0.02, atol=0.02)  # the masters are rounded to fp16
    assert not from_hub.training
    assert hub.asked("someone/", "GET")
    assert not hub.asked("text_encoder")
    assert not hub.asked("tokenizer")


def test_a_head_on_the_hub(published: Path, hub: HubServer) -> None:
    sketches = tuple(Record(f"{name}.png", "sketch", name) for name in ("cat", "dog"))
    task = Recognition(DataSet("pets", ("cat", "dog"), sketches, "all"), 32)
    save_head(task, published)
    commit = hub.publish(CHECKPOINT, published)
    hub.publish(CHECKPOINT, {"config.json": b"{}"})
    head, classes = load_head(CHECKPOINT, revision=commit)
    assert classes == ("cat", "dog")
    assert torch.equal(head[1].weight, task.head[1].weight)  # type: ignore[index]
    with pytest.raises(LoadError, match=f"{CHECKPOINT}@.* has no head"):
        load_head(CHECKPOINT)


def test_the_second_time_nothing_is_downloaded(published: Path, hub: HubServer) -> None:
    first = load()
    hub.forget()
    assert same(load(), first)
    assert [(r.method, r.path) for r in hub.requests] == [("HEAD", f"/{CHECKPOINT}/resolve/main/config.json")]
    hub.forget()
    load(revision=hub.repositories[CHECKPOINT].refs["main"])
    assert hub.requests == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(published: Path, hub: HubServer) -> None:
    main = load()
    first = hub.repositories[CHECKPOINT].refs["main"]
    rewrite(published / "model.safetensors", lambda w: {k: v * 1.5 for k, v in w.items()})
    second = hub.publish(CHECKPOINT, published, "other")
    other = load(revision="other")
    assert not same(other, main)
    assert same(load(revision=second), other)
    assert same(load(f"{CHECKPOINT}@other"), other)
    for wrong in (f"{published}@other", "mini@other"):
        with pytest.raises(LoadError, match="revision='other' is for Hub repositories"):
            load(wrong)
    with pytest.raises(LoadError, match="no Hub repository"):
        load(f"{CHECKPOINT}@")
    hub.publish(CHECKPOINT, published, "main")
    assert same(load(), other)
    assert same(load(revision=first), main)


def test_backbones_stay_at_the_commit_that_is_pinned(published: Path, hub: HubServer, parts: dict[str, Path]) -> None:
    before = load()
    for path in (parts["diffusion"] / WEIGHTS["unet"], parts["semantic"] / "model.safetensors"):
        rewrite(path, lambda w: {k: v * 1.5 for k, v in w.items()})
    hub.publish(DIFFUSION, parts["diffusion"])
    hub.publish(SEMANTIC, parts["semantic"])
    assert same(load(), before)
    assert not same(load(diffusion=DIFFUSION), before)
    assert not same(load(semantic=SEMANTIC), before)


def test_cache_dir(published: Path, hub: HubServer, tmp_path: Path) -> None:
    load(cache_dir=tmp_path / "elsewhere")
    assert not (tmp_path / "cache").exists()
    assert sorted(p.name for p in (tmp_path / "elsewhere").glob("models--*")) == [
        "models--someone--checkpoint",
        "models--someone--diffusion",
        "models--someone--vision",
    ]


def test_the_token_goes_with_every_request(published: Path, hub: HubServer) -> None:
    build(DIFFUSION, SEMANTIC, token="hf_secret")
    load(token="hf_secret")
    headers = [{k.lower(): v for k, v in r.headers.items()} for r in hub.asked("someone/")]
    assert {h.get("authorization") for h in headers} == {"Bearer hf_secret"}
    assert "hf_secret" not in repr(Location("someone/checkpoint", token="hf_secret"))


@pytest.mark.parametrize("form", ["folder", "mirror", "modules"])
def test_another_place_for_a_backbone(
    published: Path, hub: HubServer, backbones: dict[str, Path], form: str, tmp_path: Path
) -> None:
    expected = load()
    for repo in (DIFFUSION, SEMANTIC):
        hub.fail(repo, "removed")
    refused(load_without_cache := lambda **places: load(cache_dir=tmp_path / "cold", **places), DIFFUSION)
    if form == "folder":
        places: dict[str, Any] = dict(backbones)
    elif form == "mirror":
        commits = {name: hub.publish(f"mirror/{name}", path) for name, path in backbones.items()}
        places = {name: f"mirror/{name}" for name in backbones}
    else:
        places = {"diffusion": pipeline(backbones["diffusion"]), "semantic": vision(backbones["semantic"])}
    model = load_without_cache(**places)
    assert same(model, expected)
    if form == "folder":
        assert model.config.diffusion.source == str(backbones["diffusion"])
        assert model.config.diffusion.revision is None
    if form == "mirror":
        assert (model.config.semantic.source, model.config.semantic.revision) == (
            "mirror/semantic",
            commits["semantic"],
        )


# ---- offline

PROGRAM = """
import sys
from sketchfusion import LoadError, SketchFusion
picture, out, *caches = sys.argv[1:]
for cache in caches:
    try:
        model = SketchFusion.from_pretrained("someone/checkpoint", device="cpu", dtype="float32", cache_dir=cache)
        model.encode(picture).save(out)
    except LoadError as error:
        print(error)
"""


def test_fresh_processes_with_hf_endpoint_and_offline(published: Path, hub: HubServer, tmp_path: Path) -> None:
    """The environment as a user sets it; and what a healthy load prints: nothing."""
    PICTURE.save(tmp_path / "picture.png")
    load()
    hub.forget()

    def start(out: str, *caches: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url} | variables
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "picture.png"), str(tmp_path / out)]
        command += [str(tmp_path / cache) for cache in caches]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    online, offline = start("online", "other cache"), start("offline", "cache", "no cache", HF_HUB_OFFLINE="1")
    printed, stray = offline.communicate()
    assert offline.returncode == 0, stray
    assert "offline" in printed
    assert len(printed.splitlines()) == 1
    assert stray == ""
    printed, stray = online.communicate()
    assert online.returncode == 0, stray
    assert printed == ""
    assert len(hub.asked(f"{CHECKPOINT}/resolve/main/config.json", "GET")) == 1
    a, b = (Features.load(tmp_path / name).dense for name in ("online", "offline"))
    assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"local_files_only": True}], ids=["server down", "local_files_only"])
def test_without_a_connection(published: Path, hub: HubServer, naps: list[float], arguments: dict[str, Any]) -> None:
    if not arguments:
        hub.stop()
    refused(lambda: load(**arguments), CHECKPOINT, "not in the Hub's cache", "folder")
    assert not hub.requests


def test_what_is_cached_loads_at_once_without_a_connection(published: Path, hub: HubServer, naps: list[float]) -> None:
    online = load()
    hub.forget()
    assert same(load(local_files_only=True), online)
    assert not hub.requests
    hub.stop()
    assert same(load(), online)
    assert naps == []


def test_a_slow_hub_is_waited_for_unless_there_is_a_cache(
    published: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.fail(f"{CHECKPOINT}/resolve/main/config.json", "slow")
    cold = load()
    hub.publish(CHECKPOINT, published, "main")  # not seen in time: what is cached will do
    assert same(load(), cold)


def test_a_cache_with_a_hole_is_named(published: Path, hub: HubServer, tmp_path: Path) -> None:
    load()
    next((tmp_path / "cache").glob("models--someone--diffusion/snapshots/*/unet/*.safetensors")).unlink()
    refused(lambda: load(local_files_only=True), "unet/diffusion_pytorch_model.safetensors", DIFFUSION)
    load()


# ---- what the Hub may answer


@pytest.mark.parametrize("repo", [CHECKPOINT, DIFFUSION])
@pytest.mark.parametrize("fault", [fault for fault in REFUSALS if fault != "no entry"])
def test_refusals(published: Path, hub: HubServer, repo: str, fault: str) -> None:
    hub.fail(repo, fault)
    expected = {
        "removed": "there is no folder and no Hub repository {}",
        "removed, for the anonymous": "there is no folder and no Hub repository {}",
        "bad token": "token=",
        "gated": "{} is gated: accept its terms",
        "forbidden": "the Hub refused",
        "no revision": "{} has no revision",
        "broken": "answered 500",
        "busy": "answered 503",
    }[fault]
    refused(load, expected.format(repo), repo)


def test_only_a_missing_preprocessor_is_a_missing_preprocessor(hub: HubServer, parts: dict[str, Path]) -> None:
    hub.fail("preprocessor_config.json", "broken")
    refused(lambda: build(DIFFUSION, SEMANTIC), "preprocessor_config.json", "answered 500")
    assert build(DIFFUSION, SEMANTIC, **MEANS).config.semantic.image_size == 32  # as the configuration says
    hub.heal()
    (parts["semantic"] / "preprocessor_config.json").unlink()
    hub.publish(SEMANTIC, parts["semantic"])
    assert build(DIFFUSION, SEMANTIC).config.semantic.mean == CLIP_MEAN
    assert build(DIFFUSION, SEMANTIC, **MEANS).config.semantic.mean == (0.4, 0.5, 0.6)


def test_a_backbone_that_is_no_clip_has_to_say_its_normalisation(parts: dict[str, Path], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="semantic_mean=") as caught:
        build(parts["diffusion"], tmp_path)
    assert caught.value.key == "semantic_mean"


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        ({"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),
        ({"do_normalize": False, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}, (0.0,) * 3, (1.0,) * 3),
        ({"do_rescale": False, "image_mean": [100] * 3, "image_std": [50] * 3}, None, "does not rescale pixels"),
        ({"image_mean": "abc", "image_std": [1] * 3}, None, "reading .*processor_config.json"),
    ],
)
def test_what_a_preprocessor_says(parts: dict[str, Path], file: str, values: Any, mean: Any, std: Any) -> None:
    (parts["semantic"] / "preprocessor_config.json").unlink()
    nested = {"image_processor": values} if file == "processor_config.json" else values  # since transformers 5
    (parts["semantic"] / file).write_text(json.dumps(nested))
    if mean is None:
        with pytest.raises(LoadError, match=std):
            build(**parts)
        return
    semantic = build(**parts).config.semantic
    assert (semantic.mean, semantic.std) == (mean, std)


def test_a_variant_that_is_there_is_named(parts: dict[str, Path]) -> None:
    unet = parts["diffusion"] / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(LoadError, match="pass variant='fp16'"):
        build(**parts)


def test_an_inpainting_unet_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    unet = parts["diffusion"] / "unet"
    config = json.loads((unet / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(unet)
    with pytest.raises(LoadError, match="takes 9 channels and the VAE makes 4"):
        build(**parts)


@pytest.mark.parametrize("wrong", [{"semantic_std": "abc"}, {"semantic_mean": [0.5]}, {"semantic_image_size": "32"}])
def test_settings_of_the_semantic_backbone_are_checked(backbones: dict[str, Path], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**backbones, **MEANS | wrong)
    assert caught.value.key == next(iter(wrong)).replace("_", ".", 1)


def test_a_second_attempt_is_explained_by_itself(published: Path, hub: HubServer) -> None:
    hub.fail(CHECKPOINT, "gated")
    try:
        load()
    except LoadError:
        hub.heal()
        hub.fail(WEIGHTS["unet"], "broken")
        refused(load, "answered 500", "unet")


@pytest.mark.parametrize("repo", MIRRORS)
def test_removed_stable_diffusions_name_their_mirror(published: Path, hub: HubServer, repo: str) -> None:
    expected = load()
    edit(published / "config.json", diffusion={"source": repo})
    refused(lambda: load(published), repo, MIRRORS[repo], "diffusion=")
    refused(lambda: build(repo, SEMANTIC), repo, MIRRORS[repo])
    hub.publish(MIRRORS[repo], hub.files(DIFFUSION))
    assert same(load(published, diffusion=MIRRORS[repo]), expected)


def test_a_revision_that_is_not_there(published: Path, hub: HubServer) -> None:
    refused(lambda: load(revision="v9"), CHECKPOINT, "'v9'")
    edit(published / "config.json", diffusion={"revision": "0" * 40})
    refused(lambda: load(published), DIFFUSION, "0" * 40)
    refused(lambda: build(DIFFUSION, SEMANTIC, semantic_revision="v9"), SEMANTIC, "'v9'")


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        (CHECKPOINT, "config.json"),
        (CHECKPOINT, "model.safetensors"),
        (DIFFUSION, "vae/config.json"),
        (DIFFUSION, "unet/config.json"),
        (DIFFUSION, "scheduler/scheduler_config.json"),
        (DIFFUSION, WEIGHTS["vae"]),
        (DIFFUSION, WEIGHTS["unet"]),
        (SEMANTIC, "config.json"),
        (SEMANTIC, "model.safetensors"),
    ],
)
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_a_missing_file_is_named(
    published: Path, hub: HubServer, parts: dict[str, Path], where: str, repo: str, name: str
) -> None:
    if where == "hub":
        held = hub.files(repo)
        del held[name]
        refused(load, repo, f"has no {name}")
    else:
        folder = {CHECKPOINT: published, DIFFUSION: parts["diffusion"], SEMANTIC: parts["semantic"]}[repo]
        (folder / name).unlink()
        refused(lambda: load(published, **parts), str(folder), f"has no {name}")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_download_that_breaks_off_leaves_nothing_behind(
    published: Path, hub: HubServer, tmp_path: Path, part: str
) -> None:
    repo = REPOSITORY[part]
    hub.fail(WEIGHTS[part].format(hub.repositories[repo].refs["main"]), "truncated")
    refused(load, WEIGHTS[part].rpartition("{}/")[2], repo)
    cached = [p for p in (tmp_path / "cache" / f"models--{repo.replace('/', '--')}").rglob("*") if p.is_file()]
    assert {p.suffix for p in cached if "snapshots" in p.parts and part in str(p)} <= {".json"}
    contents = list(hub.files(repo).values())
    assert all(p.read_bytes() in contents for p in cached if "blobs" in p.parts)
    hub.heal()
    assert same(load(), load(published))


def test_a_download_that_is_cut_goes_on_where_it_was(
    published: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is received of the last chunk is lost
    hub.fail(WEIGHTS["unet"], "cut")
    assert same(load(), load(published))
    size = len(hub.files(DIFFUSION)[WEIGHTS["unet"]])
    headers = [{k.lower(): v for k, v in r.headers.items()} for r in hub.asked(WEIGHTS["unet"], "GET")]
    assert [h.get("range") for h in headers] == [None, f"bytes={size // 2 // 1000 * 1000}-"]


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_corrupt_file_is_named_and_deleting_it_mends_the_cache(published: Path, hub: HubServer, part: str) -> None:
    repo = REPOSITORY[part]
    hub.fail(WEIGHTS[part].format(hub.repositories[repo].refs["main"]), "corrupt")
    refused(load, repo, "safetensors")
    hub.heal()
    message = refused(load, repo, "safetensors")  # the cache does not know
    named = re.search(r"delete (\S+) and load again", message)
    assert named is not None
    Path(named[1]).unlink()
    assert same(load(), load(published))


# ---- pickles


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that leaves a trace when it is loaded."""
    trace = tmp_path / "trace"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    pickled = pickle.dumps(Bomb())
    pickle.loads(pickled)
    assert trace.exists()
    trace.unlink()
    yield pickled
    assert not trace.exists()


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("disguise", ["pickle", "safetensors", "shard"])
@pytest.mark.parametrize("part", WEIGHTS)
def test_pickles_are_never_loaded(
    published: Path, hub: HubServer, parts: dict[str, Path], bomb: bytes, part: str, disguise: str, where: str
) -> None:
    repo = REPOSITORY[part]
    folder = {CHECKPOINT: published, SEMANTIC: parts["semantic"], DIFFUSION: parts["diffusion"]}[repo]
    weights = folder / (WEIGHTS[part] if repo == DIFFUSION else "model.safetensors")
    pickled = weights.with_name("diffusion_pytorch_model.bin" if repo == DIFFUSION else "pytorch_model.bin")
    weights.unlink()
    if disguise == "safetensors":
        weights.write_bytes(bomb)
    else:
        pickled.write_bytes(bomb)
    if disguise == "shard":
        index = {"metadata": {"total_size": 1}, "weight_map": {"a": pickled.name}}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    if where == "hub":
        commit = hub.publish(repo, folder)
        if repo != CHECKPOINT:
            edit(published / "config.json", **{"semantic" if part == "semantic" else "diffusion": {"revision": commit}})
            hub.publish(CHECKPOINT, published)
        message = refused(load, repo.partition("/")[2], "safetensors")
    else:
        message = refused(lambda: load(published, **parts), str(folder), "safetensors")
    if repo != CHECKPOINT:
        assert "pickle" in message
        assert (f"names {pickled.name}" in message) == (disguise == "shard")


def test_an_old_kind_of_index_brings_in_no_pickle(parts: dict[str, Path], bomb: bytes) -> None:
    """diffusers prefers it to the whole file where a variant is asked for."""
    for part in ("vae", "unet"):
        path = parts["diffusion"] / WEIGHTS[part]
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    unet = parts["diffusion"] / "unet"
    build(**parts, variant="fp16")
    (unet / "shard.bin").write_bytes(bomb)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "shard.bin"}}
    (unet / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(index))
    refused(lambda: build(**parts, variant="fp16"), "names shard.bin", "pickle")


def test_a_repositorys_own_code_is_never_run(parts: dict[str, Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (parts["semantic"] / "odd.py").write_text(f"open({str(trace)!r}, 'w')\n")
    names = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.Odd"}
    edit(parts["semantic"] / "config.json", model_type="odd", auto_map=names)
    refused(lambda: build(**parts), str(parts["semantic"]))
    assert not trace.exists()


# ---- what does not fit


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"aggregator_width": 64}, "aggregator_width"),
        ("config.json", {"sites": ["down0"]}, "does not fit its config.json"),
        ("config.json", {"taps": ["up0", "up1", "up2", "up3"]}, "does not fit its config.json"),
        ("semantic/config.json", {"hidden_size": 24}, "semantic"),
        ("diffusion/unet/config.json", {"block_out_channels": [8, 16, 32, 64]}, "unet"),
        ("diffusion/vae/config.json", {"block_out_channels": [8, 8, 16, 32]}, "vae"),
        ("diffusion/vae/config.json", {"down_block_types": ["Nonsense"] * 4}, "vae"),
        ("diffusion/unet/config.json", {"addition_embed_type": "text"}, "unet"),
    ],
)
def test_shapes_that_do_not_fit(
    model: SketchFusion, tmp_path: Path, file: str, changes: dict[str, Any], expected: str
) -> None:
    model.save_pretrained(tmp_path / "checkpoint", include_backbones=True)
    edit(tmp_path / "checkpoint" / file, **changes)
    refused(lambda: load(tmp_path / "checkpoint", dtype="bfloat16"), expected)
    assert torch.get_default_dtype() == torch.float32


def test_a_loaded_model_can_be_pickled(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, include_backbones=True)
    loaded = load(tmp_path)
    again = pickle.loads(pickle.dumps(loaded))
    image = np.zeros((20, 30, 3), np.uint8)
    assert torch.equal(again.encode(image).dense, loaded.encode(image).dense)


def test_others_may_read_a_saved_checkpoint(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint", include_backbones=True)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {ordinary.stat().st_mode}


def test_another_stable_diffusion_does_not_fit(published: Path, tmp_path: Path) -> None:
    other = write_diffusion(tmp_path / "other", cross_attention_dim=16)
    refused(lambda: load(diffusion=other), "24", "16", "another Stable Diffusion")


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", "aggregator.mixing_weights"),
        ("model.safetensors", "null_prompt"),
        ("semantic/model.safetensors", "encoder.layers.0.mlp.fc1.weight"),
        ("diffusion/unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("diffusion/vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"),
    ],
)
def test_a_missing_tensor_is_never_made_up(model: SketchFusion, tmp_path: Path, file: str, tensor: str) -> None:
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, include_backbones=True)

    def without(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        (found,) = [name for name in weights if name.endswith(tensor)]
        return {name: weight for name, weight in weights.items() if name != found}

    rewrite(folder / file, without)
    refused(lambda: load(folder), tensor, str((folder / file).parent))


def test_an_unknown_tensor_of_the_checkpoint_is_refused(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda w: w | {"adapters.extra": torch.zeros(1)})
    refused(lambda: load(tmp_path), "adapters.extra")


def test_a_weight_that_is_not_finite_is_refused(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda w: w | {"aggregator.mixing_weights": torch.full((3,), torch.nan)})
    refused(lambda: load(tmp_path), "aggregator.mixing_weights", "not finite")


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    refused(lambda: load(tmp_path / "model.safetensors"), "model.safetensors", "folder")


@pytest.mark.parametrize("source", ["nonsense", "/no/such/folder", "a/b/c", "bad name/with space", "./there/is/none"])
def test_a_source_that_is_nothing(hub: HubServer, source: str) -> None:
    refused(lambda: load(source), source)
    assert not hub.asked("resolve")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, published: Path) -> None:
    refused(lambda: load(tmp_path), str(tmp_path), "config.json")
    refused(lambda: load(diffusion=tmp_path), str(tmp_path), "vae/config.json")


@pytest.mark.parametrize(
    "file",
    ["config.json", "semantic/config.json", "diffusion/unet/config.json", "diffusion/scheduler/scheduler_config.json"],
)
def test_broken_json(model: SketchFusion, tmp_path: Path, file: str) -> None:
    model.save_pretrained(tmp_path, include_backbones=True)
    (tmp_path / file).write_text('{"a": ')
    refused(lambda: load(tmp_path), str((tmp_path / file).parent))


def test_an_unknown_key_of_the_configuration(published: Path, hub: HubServer) -> None:
    edit(published / "config.json", sitez=["down0"])
    hub.publish(CHECKPOINT, published)
    for source in (CHECKPOINT, published):
        with pytest.raises(ConfigError, match=r"sitez.*did you mean 'sites'"):
            load(source)


# ---- variants, shards


def test_variants(hub: HubServer, parts: dict[str, Path], tmp_path: Path) -> None:
    halved = {}
    for part in ("vae", "unet"):
        path = parts["diffusion"] / WEIGHTS[part]
        rewrite(path, lambda w: {k: v.half() for k, v in w.items()})
        halved[part] = path.read_bytes()
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    hub.publish("someone/half", parts["diffusion"])
    refused(lambda: build("someone/half", SEMANTIC), "someone/half", "vae/diffusion_pytorch_model.safetensors")
    refused(lambda: build("someone/half", SEMANTIC, variant="bf16"), "vae/diffusion_pytorch_model.bf16.safetensors")
    model = build("someone/half", SEMANTIC, variant="fp16")
    assert model.dtype == torch.float32

    model.save_pretrained(tmp_path / "named")
    hub.publish(CHECKPOINT, tmp_path / "named")
    refused(load, "vae/diffusion_pytorch_model.safetensors")
    by_name = load(variant="fp16")
    by_name.save_pretrained(tmp_path / "complete", include_backbones=True)
    complete = load(tmp_path / "complete")
    assert same(complete, by_name)
    for part in ("vae", "unet"):
        assert (tmp_path / "complete" / "diffusion" / WEIGHTS[part]).read_bytes() == halved[part]
    assert not list((tmp_path / "complete").rglob("*fp16*"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(hub: HubServer, parts: dict[str, Path], tmp_path: Path, variant: str | None) -> None:
    expected = build(**parts)
    for path, cls in {"diffusion/unet": UNet2DConditionModel, "semantic": CLIPVisionModel}.items():
        whole = cls.from_pretrained(parts["diffusion"].parent / path)
        next((parts["diffusion"].parent / path).glob("*.safetensors")).unlink()
        named = variant if cls is UNet2DConditionModel else None
        whole.save_pretrained(parts["diffusion"].parent / path, max_shard_size="10KB", variant=named)
    if variant:
        vae = parts["diffusion"] / WEIGHTS["vae"]
        vae.rename(vae.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    hub.publish("someone/sharded", parts["diffusion"])
    hub.publish("someone/sharded-vision", parts["semantic"])
    torch.manual_seed(0)
    model = build("someone/sharded", "someone/sharded-vision", variant=variant)
    assert all(len(hub.asked(f"{repo}/", "GET")) > 5 for repo in ("someone/sharded", "someone/sharded-vision"))
    tapped = expected.state_dict() | {k: v for k, v in model.state_dict().items() if "aggregator" in k}
    expected.load_state_dict(tapped)
    assert same(model, expected)
    model.save_pretrained(tmp_path / "complete", include_backbones=True)
    assert same(load(tmp_path / "complete"), load_rounded(model, tmp_path))
    model.save_pretrained(tmp_path / "named")
    hub.stop()
    assert same(load(tmp_path / "named", variant=variant), load(tmp_path / "complete"))


def load_rounded(model: SketchFusion, tmp_path: Path) -> SketchFusion:
    """The model after its masters were rounded to float16."""
    model.save_pretrained(tmp_path / "rounded")
    return load(tmp_path / "rounded", variant=model._variant)


# ---- from backbones


def pipeline(folder: Path) -> SimpleNamespace:
    """What a loaded Stable Diffusion pipeline holds."""
    return SimpleNamespace(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )


def vision(folder: Path) -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(folder)


def test_a_tokenizer_that_does_not_say_its_length(backbones: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(backbones["diffusion"], tmp_path / "sd")
    settings = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if "max" not in k}))
    prompts = [make_null_prompt(Location(str(place))) for place in (backbones["diffusion"], tmp_path / "sd")]
    assert torch.equal(*prompts)


def test_commits_are_recorded(
    hub: HubServer, backbones: dict[str, Path], parts: dict[str, Path], tmp_path: Path
) -> None:
    commits = {repo: hub.repositories[repo].refs["main"] for repo in (DIFFUSION, SEMANTIC)}
    torch.manual_seed(0)
    model = build(DIFFUSION, SEMANTIC)
    assert (model.config.diffusion.source, model.config.diffusion.revision) == (DIFFUSION, commits[DIFFUSION])
    assert (model.config.semantic.source, model.config.semantic.revision) == (SEMANTIC, commits[SEMANTIC])
    torch.manual_seed(0)
    folders = build(**backbones)
    assert folders.config.diffusion.source == str(backbones["diffusion"])
    assert folders.config.diffusion.revision is None
    assert same(model, folders)

    (parts["diffusion"] / WEIGHTS["unet"]).write_bytes(b"")
    hub.publish(DIFFUSION, parts["diffusion"])  # moves on between loading and saving
    model.save_pretrained(tmp_path / "complete", include_backbones=True)
    assert files(tmp_path / "complete" / "diffusion" / "unet") == files(backbones["diffusion"] / "unet")
    build(DIFFUSION, SEMANTIC, diffusion_revision=commits[DIFFUSION])


@pytest.mark.parametrize("form", ["folder", "hub", "pipeline"])
def test_the_null_prompt_is_the_text_encoders_answer_to_nothing(
    hub: HubServer, backbones: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pipeline(backbones["diffusion"])
    ids = torch.tensor([[TOKENS.index("<|startoftext|>"), TOKENS.index("<|endoftext|>")] + [0] * 75])
    expected = loaded.text_encoder(ids).last_hidden_state[0]
    sources = {"folder": backbones["diffusion"], "hub": DIFFUSION, "pipeline": loaded}
    model = build(sources[form], backbones["semantic"], dtype="bfloat16")
    assert model.diffusion.null_prompt.shape == (77, 24)
    assert torch.allclose(model._null_prompt, expected, atol=1e-6)  # what is saved is not rounded to bfloat16


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
@pytest.mark.parametrize("form", ["folder", "hub", "pipeline", "pipeline without"])
def test_a_diffusion_backbone_without_text_encoder_asks_for_the_null_prompt(
    hub: HubServer, parts: dict[str, Path], part: str, form: str
) -> None:
    source: Any = parts["diffusion"]
    if form.startswith("pipeline"):
        source = pipeline(parts["diffusion"])
        setattr(source, part, None)
        if form == "pipeline without":
            delattr(source, part)
    else:
        shutil.rmtree(source / part)
    if form == "hub":
        hub.publish("someone/bare", source)
        source = "someone/bare"
    refused(lambda: build(source, SEMANTIC), part, "null_prompt=")
    prompt = torch.randn(77, 24)
    assert torch.equal(build(source, SEMANTIC, null_prompt=prompt).diffusion.null_prompt, prompt)


def test_a_tokenizer_that_does_not_fit_is_refused(parts: dict[str, Path]) -> None:
    (parts["diffusion"] / "tokenizer" / "vocab.json").unlink()
    refused(lambda: build(**parts), "tokenizer")


@pytest.mark.parametrize("whole", [False, True], ids=["vision tower", "whole CLIP"])
def test_loaded_modules_are_never_modified(backbones: dict[str, Path], tmp_path: Path, whole: bool) -> None:
    diffusion, semantic = pipeline(backbones["diffusion"]), vision(backbones["semantic"])
    if whole:
        text = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=semantic.config.to_dict(), projection_dim=16
        )
        clip = CLIPModel(config)
        clip.vision_model.load_state_dict(
            {k.removeprefix("vision_model."): v for k, v in semantic.state_dict().items()}
        )
        semantic = clip
    modules: list[nn.Module] = [diffusion.vae, diffusion.unet, diffusion.text_encoder, semantic]
    for i, module in enumerate(modules):
        module.train(i % 2 == 0).requires_grad_(i % 2 == 1)

    def state() -> list[Any]:
        return [
            [(name, p.requires_grad, p.dtype, p.clone()) for name, p in module.named_parameters()]
            + [(name, m.training, type(m)) for name, m in module.named_modules()]
            + [(name, b.clone()) for name, b in module.named_buffers()]
            + [dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config)]
            for module in modules
        ]

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b)

    before = state()
    torch.manual_seed(0)
    model = build(diffusion, semantic, **MEANS)
    torch.manual_seed(0)
    assert same(model, build(**backbones))
    features(build(diffusion, semantic, **MEANS | {"dtype": "bfloat16"}))
    features_ = model.train()(*map(torch.utils.data.default_collate, zip(model.preprocess(PICTURE))))
    features_.pooled.sum().backward()
    model.to(torch.bfloat16).to("meta")
    assert equal(before, state())

    torch.manual_seed(0)
    build(diffusion, semantic, **MEANS).save_pretrained(tmp_path / "complete")  # modules have no address
    torch.manual_seed(0)
    build(**backbones).save_pretrained(tmp_path / "named")
    assert same(load(tmp_path / "complete"), load(tmp_path / "named"))
    assert equal(before[0][:-1], state()[0][:-1])


@pytest.mark.parametrize("missing", ["vae", "unet", "scheduler"])
def test_an_object_that_is_no_pipeline(backbones: dict[str, Path], missing: str) -> None:
    source = pipeline(backbones["diffusion"])
    delattr(source, missing)
    refused(lambda: build(source, backbones["semantic"]), f"has no {missing}")


def test_a_model_that_is_no_vision_transformer(backbones: dict[str, Path]) -> None:
    text_encoder = backbones["diffusion"] / "text_encoder"
    for source in (nn.Linear(2, 2), text_encoder, CLIPTextModel.from_pretrained(text_encoder)):
        refused(lambda source=source: build(backbones["diffusion"], source, **MEANS), "vision transformer")


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_clip(folder: Path) -> Any:
    """The whole of CLIP, as published: a text tower, and a buffer that transformers no longer has."""
    tower = {**VISION, "projection_dim": 16}
    del tower["image_size"], tower["patch_size"]
    model = CLIPModel(transformers.CLIPConfig(text_config=tower, vision_config=VISION, projection_dim=16))
    model.save_pretrained(folder)
    ids = {f"{t}_model.embeddings.position_ids": torch.arange(n)[None] for t, n in {"vision": 17, "text": 77}.items()}
    rewrite(folder / "model.safetensors", lambda weights: weights | ids)
    return model.vision_model


def write_siglip(folder: Path) -> Any:
    tower = {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=tower, vision_config=VISION))
    model.save_pretrained(folder)
    return model.vision_model


def write_vit(folder: Path) -> Any:
    """As DINO is published: without the pooler that AutoModel gives a ViT."""
    model = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)
    model.save_pretrained(folder)
    return model


def write_dino(name: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        config = {key: value for key, value in VISION.items() if key != "intermediate_size"}
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        return model

    return write


@pytest.mark.parametrize("image_size", [32, 48], ids=["native size", "other size"])
@pytest.mark.parametrize(
    ("write", "special"),
    [
        pytest.param(write_clip, 1, id="clip"),
        pytest.param(write_siglip, 0, id="siglip"),
        pytest.param(write_vit, 1, id="dino"),
        pytest.param(write_dino("Dinov2"), 1, id="dinov2"),
        pytest.param(write_dino("Dinov2WithRegisters"), 5, id="dinov2 with registers"),
    ],
)
def test_vision_transformers(
    backbones: dict[str, Path], tmp_path: Path, write: Callable[[Path], Any], special: int, image_size: int
) -> None:
    """Tokens are the library's own hidden_states[-1], without the special ones."""
    torch.manual_seed(0)
    library = write(tmp_path / "vision").eval()
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    means: dict[str, Any] = {"semantic_mean": [0.5] * 3, "semantic_std": [0.5] * 3, "semantic_image_size": image_size}
    pixels = torch.rand(2, 3, image_size, image_size)
    adapts = {} if write.__qualname__.startswith("write_dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        hidden = library(pixels * 2 - 1, output_hidden_states=True, **adapts).hidden_states[-1]
    grid = image_size // 8
    assert hidden.shape == (2, special + grid**2, 16)
    expected = hidden[:, special:].reshape(2, grid, grid, 16).permute(0, 3, 1, 2)
    for source in (tmp_path / "vision", library):
        model = build(backbones["diffusion"], source, **means)
        assert torch.allclose(model.semantic(pixels), expected, atol=1e-5)
    with_own_mean = build(backbones["diffusion"], tmp_path / "vision", semantic_image_size=image_size)
    assert with_own_mean.config.semantic.mean == (0.5,) * 3
    model.save_pretrained(tmp_path / "complete", include_backbones=True)
    assert torch.allclose(load(tmp_path / "complete").semantic(pixels), expected, atol=1e-5)


CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "image_size": 32},  # it has a patch_size
    "EfficientNet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 0.5,
        "hidden_dim": 1280,
        "image_size": 32,
        "hidden_act": "relu6",
        "squeeze_expansion_ratio": 0.0,
    },
}


def write_convolutional(name: str, folder: Path) -> Any:
    """A network of convolutions with random weights, as published: the size of its images is in one file or another."""
    model = make_convolutional(name, **CONVOLUTIONAL[name])
    model.save_pretrained(folder)
    written = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return model


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks(backbones: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Their last map is the token grid, whatever its side and width are called in the configuration."""
    library = write_convolutional(name, tmp_path / "vision")
    means: dict[str, Any] = {"semantic_mean": [0.5] * 3, "semantic_std": [0.5] * 3}
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = library(pixels * 2 - 1).last_hidden_state
    assert expected.ndim == 4
    assert expected.std() > 0.01
    published = build(backbones["diffusion"], tmp_path / "vision")
    assert published.config.semantic.image_size == 32
    for model in (published, build(backbones["diffusion"], library, **means, semantic_image_size=32)):
        assert (model.semantic.width, model.semantic.grid) == (expected.shape[1], expected.shape[2])
        assert torch.allclose(model.semantic(pixels), expected, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in library.parameters())  # what was passed is as it was
    stride = 32 // expected.shape[2]
    wider = build(backbones["diffusion"], tmp_path / "vision", semantic_image_size=32 + stride).semantic
    assert wider(pixels).shape[2] == wider.grid == expected.shape[2] + 1
    with pytest.raises(ConfigError, match=f"multiple of the patch size {stride}"):
        build(
            backbones["diffusion"], tmp_path / "vision", semantic_image_size=32 + stride // 2
        )  # its map leaves a rest
    published.unfold()
    assert set(published.semantic.model.state_dict()) == set(library.state_dict())
    assert torch.allclose(published.semantic(pixels), expected, atol=1e-5)
    (tmp_path / "vision" / "LICENSE").write_text("terms")
    published.save_pretrained(tmp_path / "complete", include_backbones=True)
    assert (tmp_path / "complete" / "semantic" / "LICENSE").read_text() == "terms"
    again = load(tmp_path / "complete")
    assert torch.allclose(again.semantic(pixels), expected, atol=1e-5)
    assert torch.isfinite(again.encode(Image.new("RGB", (40, 30))).pooled).all()


def test_batch_norms_without_their_count_of_steps(backbones: dict[str, Path], tmp_path: Path) -> None:
    library = write_convolutional("ResNet", tmp_path)
    weights = tmp_path / "model.safetensors"
    rewrite(weights, lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    pixels = torch.rand(2, 3, 32, 32)
    expected = library(pixels * 2 - 1).last_hidden_state
    assert torch.allclose(build(backbones["diffusion"], tmp_path).semantic(pixels), expected, atol=1e-5)
    rewrite(weights, lambda state: {k: v for k, v in state.items() if not k.endswith("running_var")})
    refused(lambda: build(backbones["diffusion"], tmp_path), "is incomplete", "running_var")


def test_a_convolutional_network_that_does_not_say_its_size(backbones: dict[str, Path], tmp_path: Path) -> None:
    library = write_convolutional("ResNet", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.5}')
    for source in (tmp_path, library):
        with pytest.raises(ConfigError, match=r"semantic_image_size.* is not known.*patch size"):
            build(backbones["diffusion"], source, **MEANS)


def test_a_network_of_several_grids_is_refused(backbones: dict[str, Path]) -> None:
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
        )
    )
    model = build(backbones["diffusion"], swin, **MEANS)
    refused(lambda: features(model), "SwinModel", "16×16 patches", "convolutional network")


def test_a_model_whose_vision_tower_is_another_kind_is_refused(backbones: dict[str, Path]) -> None:
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32, "mlp_dim": 16}
    sam = transformers.SamModel(transformers.SamConfig(vision_config=tower))
    refused(lambda: build(backbones["diffusion"], sam, **MEANS), "SamModel", "vision_model", "vision transformer")


@pytest.mark.parametrize(
    ("written", "side"),
    [
        ({"size": 100}, 96),  # in whole strides of its map
        ({"size": {"height": 64, "width": 64}}, 64),
        ({"size": [64, 64]}, 64),
        ({"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 64}}, 64),
        ({"size": 96, "crop_size": 64, "do_center_crop": False}, 96),
        ({"size": {"height": 64, "width": 96}}, 32),  # as the configuration says
    ],
)
def test_sizes_that_convolutional_networks_were_published_with(
    backbones: dict[str, Path], tmp_path: Path, written: dict[str, Any], side: int
) -> None:
    write_convolutional("EfficientNet", tmp_path)
    preprocessor = {"image_mean": 0.5, "image_std": 0.5, **written}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert build(backbones["diffusion"], tmp_path).config.semantic.image_size == side


@pytest.mark.parametrize("top", [{}, {"include_top": True}, {"include_top": False}])
def test_efficientnets_see_what_their_preprocessor_shows_them(
    backbones: dict[str, Path], tmp_path: Path, top: dict[str, bool]
) -> None:
    """With include_top, its default, it divides by the standard deviation twice."""
    write_convolutional("EfficientNet", tmp_path)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3], "size": {"height": 32, "width": 32}, **top}
    preprocessor = transformers.EfficientNetImageProcessor(**settings)
    preprocessor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shown = preprocessor(image, return_tensors="pt").pixel_values
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    seen = build(backbones["diffusion"], tmp_path).semantic.normalized(pixels)
    assert torch.allclose(seen, shown, atol=1e-5)


def test_blue_before_red_is_refused(backbones: dict[str, Path], tmp_path: Path) -> None:
    write_convolutional("ResNet", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_flip_channel_order": true, "size": 32}')
    refused(lambda: build(backbones["diffusion"], tmp_path), "blue before red")


def test_old_names_of_the_vaes_attention(parts: dict[str, Path]) -> None:
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)")
    torch.manual_seed(0)
    expected = build(**parts)
    path = parts["diffusion"] / WEIGHTS["vae"]
    renamed = {pattern.sub(lambda m: m[1] + new[m[2]], k): v for k, v in load_file(path).items()}
    assert sum("proj_attn" in name for name in renamed) == 4  # weight and bias, encoder and decoder
    rewrite(path, lambda _: renamed)
    torch.manual_seed(0)
    assert same(build(**parts), expected)


def test_the_first_stable_diffusions(tmp_path: Path, backbones: dict[str, Path]) -> None:
    """1.x: another prompt width, one number of heads, convolutions as projections."""
    folder = write_diffusion(
        tmp_path / "sd1", cross_attention_dim=16, attention_head_dim=2, use_linear_projection=False
    )
    model = build(folder, backbones["semantic"])
    assert model.diffusion.null_prompt.shape == (77, 16)
    model.save_pretrained(tmp_path / "complete", include_backbones=True)
    reloaded = load(tmp_path / "complete")
    model.save_pretrained(tmp_path / "named")
    assert same(reloaded, load(tmp_path / "named"))


@pytest.mark.parametrize(
    ("device", "fast", "dtype"),
    [
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_the_dtype_is_what_the_device_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, device: str, fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_dtype("auto", torch.device(device)) is dtype


# ---- saving


def test_round_trips(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "first")
    first = load(tmp_path / "first")
    for (name, a), (_, b) in zip(model.named_parameters(), first.named_parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half(), b.half()), name
    first.save_pretrained(tmp_path / "second")
    assert files(tmp_path / "first")["model.safetensors"] == files(tmp_path / "second")["model.safetensors"]
    assert files(tmp_path / "first")["config.json"] == files(tmp_path / "second")["config.json"]
    load(tmp_path / "first", dtype="bfloat16").save_pretrained(tmp_path / "rough")  # the prompt is not rounded twice
    assert files(tmp_path / "rough")["model.safetensors"] == files(tmp_path / "first")["model.safetensors"]


def test_what_is_written(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(files(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    count = sum(p.numel() for p in model.trainable_parameters()) + model.diffusion.null_prompt.numel()
    assert sum(w.numel() for w in weights.values()) == count
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * count + 10_000


def test_complete_backbones_are_the_published_ones(
    model: SketchFusion, backbones: dict[str, Path], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "here", include_backbones=True)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    for part in ("unet", "vae", "scheduler"):
        assert files(moved / "diffusion" / part) == files(backbones["diffusion"] / part)
    assert files(moved / "semantic") == files(backbones["semantic"])
    for cls, folder in {AutoencoderKL: "diffusion/vae", UNet2DConditionModel: "diffusion/unet"}.items():
        whole, info = cls.from_pretrained(moved / folder, output_loading_info=True)
        assert not any(info.values()), info
    assert whole.up_blocks[3] is not None
    assert not vision(moved / "semantic").training
    config = json.loads((moved / "config.json").read_text())
    assert [config[name]["source"] for name in ("diffusion", "semantic")] == ["./diffusion", "./semantic"]
    model.save_pretrained(tmp_path / "named")
    assert same(load(moved), load(tmp_path / "named"))


def test_backbones_inside_a_checkpoint_stay_inside(hub: HubServer, model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "first", include_backbones=True)
    hub.publish(CHECKPOINT, tmp_path / "first")
    first = files(tmp_path / "first")
    for name, source in {"from the folder": tmp_path / "first", "from the Hub": CHECKPOINT}.items():
        load(source).save_pretrained(tmp_path / name)
        again = files(tmp_path / name)
        assert again.keys() == first.keys()
        assert all(again[file] == first[file] for file in first if file != "README.md")
    again = load(tmp_path / "first")
    for _ in range(2):  # into the folder it was loaded from
        again.save_pretrained(tmp_path / "first")
        assert files(tmp_path / "first") == first
    assert same(again, load(tmp_path / "first"))


def test_overwriting(model: SketchFusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "fresh")
    over, fresh = (files(tmp_path / name) for name in ("checkpoint", "fresh"))
    assert over["model.safetensors"] == fresh["model.safetensors"]
    (tmp_path / "file").write_text("")
    refused(lambda: model.save_pretrained(tmp_path / "file"), str(tmp_path / "file"))


def test_overwriting_leaves_no_weights_in_pieces(
    model: SketchFusion, backbones: dict[str, Path], tmp_path: Path
) -> None:
    """The libraries read an index where they find one."""
    model.save_pretrained(tmp_path, include_backbones=True)
    unet, semantic = pipeline(backbones["diffusion"]).unet, vision(backbones["semantic"])
    with torch.no_grad():
        for parameter in (*unet.parameters(), *semantic.parameters()):
            parameter.zero_()
    unet.save_pretrained(tmp_path / "diffusion" / "unet", max_shard_size="10KB")
    semantic.save_pretrained(tmp_path / "semantic", max_shard_size="10KB")
    (tmp_path / "training.safetensors").touch()
    model.save_pretrained(tmp_path, include_backbones=True)
    model.save_pretrained(tmp_path / "fresh", include_backbones=True)
    assert same(load(tmp_path), load(tmp_path / "fresh"))
    torch.testing.assert_close(
        load(tmp_path).encode(PICTURE).pooled, model.encode(PICTURE).pooled, rtol=0.02, atol=0.02
    )
    assert not list(tmp_path.rglob("*.index*"))
    assert (tmp_path / "training.safetensors").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("File too large")])
def test_a_full_disk(model: SketchFusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sketchfusion.model.save_file", full)
    with pytest.raises(SketchFusionError, match="cannot be written"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("victim", ["sketchfusion.model.save_file", "shutil.copyfile", "sketchfusion.card.render"])
def test_a_save_that_is_killed_leaves_the_old_checkpoint(
    model: SketchFusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    model.save_pretrained(tmp_path, include_backbones=True)
    before = files(tmp_path)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(1.5)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(victim, killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path, include_backbones=True)
    assert files(tmp_path) == before
    load(tmp_path)


def test_the_card(published: Path, hub: HubServer, tmp_path: Path) -> None:
    told = {"task": "retrieval", "training_data": "Sketchy", "metrics": {"mAP@200": 0.75}, "license": "CC BY 4.0"}
    old = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(old | told))
    load(published).save_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "sketchfusion"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license == "other"
    assert card.data.base_model == [DIFFUSION, SEMANTIC]
    commits = [hub.repositories[repo].refs["main"] for repo in (DIFFUSION, SEMANTIC)]
    snippet = 'SketchFusion.from_pretrained("path/or/repository")'
    for part in ["retrieval", "Sketchy", "mAP@200 0.75", "CC BY 4.0", DIFFUSION, SEMANTIC, snippet, *commits]:
        assert part in card.text
    build(DIFFUSION, SEMANTIC).save_pretrained(tmp_path / "untrained")
    assert "untrained" in ModelCard.load(tmp_path / "untrained" / "README.md").text


# ---- pushing


def test_what_is_pushed_is_what_is_saved(published: Path, hub: HubServer, tmp_path: Path) -> None:
    model = load()
    url = model.push_to_hub("someone/new", token="hf_write")
    assert url == f"{hub.url}/someone/new/commit/{hub.repositories['someone/new'].refs['main']}"
    model.save_pretrained(tmp_path / "saved")
    pushed, saved = hub.files("someone/new"), files(tmp_path / "saved")
    cards = [folder.pop("README.md").decode() for folder in (pushed, saved)]
    assert cards[0] == re.sub("path/or/repository|SketchFusion checkpoint", "someone/new", cards[1])
    assert pushed == saved
    assert {r.headers.get("authorization") for r in hub.asked("someone/new", "POST")} == {"Bearer hf_write"}
    assert same(load("someone/new"), model)
    model.push_to_hub("someone/new", include_backbones=True)  # there already
    assert "diffusion/unet/diffusion_pytorch_model.safetensors" in hub.files("someone/new")
    assert same(load("someone/new"), model)


def test_backbones_in_folders_are_pushed_with_the_model(hub: HubServer, model: SketchFusion) -> None:
    model.push_to_hub("someone/new")
    assert not re.search(r'"source": "/', hub.files("someone/new")["config.json"].decode())
    assert "semantic/model.safetensors" in hub.files("someone/new")
    load("someone/new")


@pytest.mark.parametrize(
    ("part", "fault", "expected"),
    [
        ("repos/create", "bad token", "token="),
        ("repos/create", "forbidden", "token="),
        ("/commit/main", "broken", "500"),
        ("preupload", "removed", "someone/new"),
        ("/commit/main", "no revision", "no revision"),
    ],
)
def test_a_push_that_is_refused(hub: HubServer, model: SketchFusion, part: str, fault: str, expected: str) -> None:
    hub.fail(part, fault)
    refused(lambda: model.push_to_hub("someone/new"), "someone/new", expected)
    assert not hub.repositories.get("someone/new") or not hub.repositories["someone/new"].commits


def test_a_push_without_a_connection(hub: HubServer, model: SketchFusion) -> None:
    hub.stop()
    refused(lambda: model.push_to_hub("someone/new"), "someone/new")


# ---- quiet


def test_a_healthy_load_and_save_print_nothing(
    hub: HubServer, published: Path, backbones: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load()  # downloads have their bars
    modules = pipeline(backbones["diffusion"]), vision(backbones["semantic"])
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(local_files_only=True).save_pretrained(tmp_path / "complete", include_backbones=True)
        load(tmp_path / "complete").encode(PICTURE)
        build(*modules, **MEANS).save_pretrained(tmp_path / "modules")
        build(**backbones)
        make_null_prompt(Location(str(backbones["diffusion"])))
    assert capfd.readouterr() == ("", "")
