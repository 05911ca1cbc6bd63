"""Every illegal configuration is one error that names the key and the legal values."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sketchfusion import Config, ConfigError, LoadError
from sketchfusion.config import BackboneConfig, check_blocks

BLOCKS = ("down0", "down1", "down2", "down3", "mid", "up0", "up1", "up2", "up3")
BACKBONE = BackboneConfig("owner/name", "abc", 512, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(json.loads(Config(BACKBONE, BACKBONE).to_json()))


def test_defaults_are_the_papers(values: dict[str, Any]) -> None:
    assert values["timestep"] == 195
    assert values["sites"] == ["down0", "down1", "down2", "down3", "up0", "up1", "up2"]
    assert values["taps"] == ["up0", "up1", "up2"]
    assert (values["aggregator_width"], values["aggregator_grid"]) == (1280, 60)
    assert values["inject_skips"] is True


def test_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert Config.load(path) == Config(BACKBONE, BACKBONE)


@pytest.mark.parametrize(
    ("path", "value", "key", "legal"),
    [
        (["timestp"], 3, "timestp", "timestep"),
        (["diffusion", "rev"], 3, "diffusion.rev", "revision"),
        (["timestep"], "195", "timestep", "an integer"),
        (["timestep"], True, "timestep", "an integer"),
        (["timestep"], -1, "timestep", "from 0"),
        (["inject_skips"], 1, "inject_skips", "true or false"),
        (["sites"], "down0", "sites", "a list"),
        (["sites"], ["down0", 1], "sites[1]", "a string"),
        (["sites"], ["down0", "down0"], "sites", "once"),
        (["taps"], [], "taps", "one block"),
        (["semantic"], "openai/clip", "semantic", "an object"),
        (["semantic", "mean"], [0.5, 0.5], "semantic.mean", "a list of 3"),
        (["semantic", "std"], [0.5, 0, 0.5], "semantic.std", "above 0"),
        (["diffusion", "image_size"], 500, "diffusion.image_size", "multiple of 8"),
        (["aggregator_width"], 1290, "aggregator_width", "multiple of 4"),
        (["aggregator_groups"], 7, "aggregator_width", "28"),
        (["aggregator_grid"], 0, "aggregator_grid", "from 1"),
        (["pooling"], "mean", "pooling", "max"),
        (["ensemble"], 3, "ensemble", "even"),
        (["ensemble"], 0, "ensemble", "even"),
        (["task"], 3, "task", "a string or null"),
        (["metrics"], {"map_all": "high"}, "metrics.map_all", "a number"),
        (["format_version"], 2, "format_version", "1"),
    ],
)
def test_one_error_names_key_and_legal_values(
    values: dict[str, Any], path: list[str], value: Any, key: str, legal: str
) -> None:
    inner = values
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert caught.value.key == key
    assert legal in caught.value.legal or legal in caught.value.problem
    assert key in str(caught.value)


def test_another_version_is_named_before_its_keys(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="format_version: is 2; legal: 1"):
        Config.from_dict(values | {"format_version": 2, "new": 3})


@pytest.mark.parametrize("key", ["timestep", "format_version", "diffusion", "semantic.mean"])
def test_missing_keys(values: dict[str, Any], key: str) -> None:
    outer, _, inner = key.partition(".")
    del (values[outer] if inner else values)[inner or outer]
    with pytest.raises(ConfigError, match="is missing") as caught:
        Config.from_dict(values)
    assert caught.value.key == key


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_not_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((LoadError, ConfigError), match=r"config\.json"):
        Config.load(path)


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"sites": ("down0", "up7")}, "sites", "no block 'up7'"),
        ({"taps": ("up9",)}, "taps", "no block 'up9'"),
        ({"sites": ("up2",), "taps": ("up1",)}, "sites", "after the last tap"),
    ],
)
def test_sites_and_taps_are_blocks_of_the_unet(settings: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_blocks(Config(BACKBONE, BACKBONE, **settings), BLOCKS)
    assert caught.value.key == key
    assert "down0" in caught.value.legal
