"""Data sets: every published layout, its errors, the class lists, and the split by hash."""

import json
import os
import pickle
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from sketchfusion.data import (
    NAMES,
    DataError,
    DataSet,
    Record,
    class_names,
    find_images,
    load,
    load_common,
    quickdraw,
    split,
)
from sketchfusion.data.splits import split_sketches
from sketchfusion.errors import ConfigError, ImageError, SketchFusionError
from sketchfusion.strokes import Strokes

RENDERED = "tx_000000000000"


def write(root: Path, *names: str, content: bytes = b"no image") -> Path:
    """Files whose content does not matter, so that reading one would show."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def paint(path: Path, size: tuple[int, int] = (8, 6), colour: str = "black", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def write_sketchy(root: Path, labels: Iterable[str] = ("bat", "cat", "horse"), photos: int = 2) -> Path:
    for label in labels:
        for i in range(photos):
            write(root, f"256x256/photo/{RENDERED}/{label}/n0_{i}.jpg")
            write(root, *(f"256x256/sketch/{RENDERED}/{label}/n0_{i}-{k}.png" for k in (1, 2)))
    return root


def write_tuberlin(root: Path) -> Path:
    return write(
        root, "png/filelist.txt", "png/cat/1.png", "png/cat/2.png", "png/mouse (animal)/81.png", "png/bus/9.png"
    )


def line(x: int, **more: Any) -> str:
    return json.dumps({"word": "cat", "recognized": True, **more, "drawing": [[[0, x], [0, 9]]]})


def write_quickdraw(root: Path, *labels: str, lines: Iterable[str] = (line(1), line(20, word="käse"), line(3))) -> Path:
    for label in labels or ("cat", "The Eiffel Tower"):
        write(root, f"simplified/{label}.ndjson", content="\n".join(lines).encode())
    return root


def write_psc6k(root: Path, photos: int = 5) -> Path:
    """The table in PSC6K and the images in Sketchy, as its page unpacks them."""
    rows = ["photo,sketch,class,XA,YA,XB,YB"]
    for number, label in enumerate(("bat", "cat")):
        for i in reversed(range(photos)):
            for k in (1, 2):
                photo = f"photo/tx_000100000000/{label}/n0_{i}.jpg"
                sketch = f"sketch/tx_000100000000/{label}/n0_{i}-{k}.png"
                write(root, f"Sketchy/rendered_256x256/256x256/{photo}", f"Sketchy/rendered_256x256/256x256/{sketch}")
                axes = (";".join(f"{base + j + k}.5" for j in range(8)) for base in (0, 20, 40, 60))
                rows.append(f"{photo},{sketch},{number},{','.join(axes)}")
    write(root, "PSC6K/test_pairs_ps.csv", content="\n".join(rows).encode())
    return root


def write_voc(root: Path, masks: str = "SegmentationClass") -> Path:
    """2007_1 shows a cat and two persons, of whom one is difficult; 2007_2 a difficult dog and a sheep."""
    shown = {"2007_1": [("cat", 0), ("person", 0), ("person", 1)], "2007_2": [("dog", 1), ("sheep", 0)]}
    for stem, things in shown.items():
        write(root, f"JPEGImages/{stem}.jpg", f"{masks}/{stem}.png")
        xml = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult></object>" for name, hard in things)
        write(root, f"Annotations/{stem}.xml", content=f"<annotation>{xml}</annotation>".encode())
    for name, stems in (("train", "2007_1"), ("val", "2007_2"), ("trainval", "2007_1\n2007_2\n")):
        write(root, f"ImageSets/Segmentation/{name}.txt", content=stems.encode())
    return root


def write_animals(root: Path) -> Path:
    """A photo of 80 x 60, half its original's size, with a cat, a smaller one, and void between."""
    paint(root / "images/2007_1.jpg", (80, 60))
    values = np.zeros((60, 80), dtype=np.uint8)
    values[:10, :20], values[:10, 20:25], values[:10, 30:40] = 8, 255, 15
    mask = Image.fromarray(values)
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    (root / "masks").mkdir()
    mask.save(root / "masks/2007_1.png")
    instances = [
        {"bbox": [0, 0, 5, 5], "keypoints": [[1, 1, 1], [2, 2, 1], [3, 3, 1]]},
        {"bbox": [0, 0, 40, 20], "keypoints": [[20, 10, 1], [0, 0, 0], [170, 10, 1]]},
    ]
    item = {"file": "2007_1.jpg", "cls": "cat", "voc_id": 8, "scale": 0.5, "orig": [160, 120], "instances": instances}
    meta = {"keypoint_names": ["nose", "tail", "paw"], "items": [item]}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def write_shoes(root: Path, shoes: int = 6) -> Path:
    """Each image has its ink in the box from (10, 20) to (50, 40); one sketch's toe is where no other's is."""
    parts = {}
    for i in range(shoes):
        for name in (f"photo/{i:03}.jpg", f"sketch/{i:03}-1.png", f"sketch/{i:03}-2.png"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).rectangle((10, 20, 49, 39), fill="black")
            image.save(path, quality=100, subsampling=0)
            parts[path.stem] = {"toe": [0, 0.5, 0.2, 0.5], "heel": [0.75, 0.25 + 0.01 * i, 0.25, 0.5]}
    parts["001"]["toe"] = [0.01, 0.5, 0.2, 0.5]  # no outlier, though all others are the same
    parts["000-2"]["toe"] = [0.8, 0.5, 0.2, 0.5]
    (root / "parts.json").write_text(json.dumps({"note": "", "parts": parts}))
    return root


def write_folder(root: Path) -> Path:
    return write(
        root, "photo/mug/1.jpg", "photo/mug/a-b.webp", "sketch/mug/1-2.png", "sketch/mug/a-b.svg", "photo/pen/x.PNG"
    )


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sketchy": write_sketchy,
    "tuberlin": write_tuberlin,
    "quickdraw": write_quickdraw,
    "psc6k": write_psc6k,
    "folder": write_folder,
    "voc": write_voc,
    "shoes": write_shoes,
}


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(*arguments, **options)
    return str(caught.value)


# The layouts


def test_sketchy(tmp_path: Path) -> None:
    root = write_sketchy(tmp_path)
    write(root, f"256x256/photo/{RENDERED}/cat/.DS_Store", f"256x256/photo/{RENDERED}/cat/._n0_0.jpg", "README.txt")
    found = load("sketchy", root)
    assert (found.name, found.classes, len(found.records)) == ("sketchy", ("bat", "cat", "horse"), 18)
    assert found.split == "Sketchy, all classes (3 of 125 classes found)"
    assert [record.label for record in found.records] == ["bat"] * 6 + ["cat"] * 6 + ["horse"] * 6
    assert found.records[0] == Record(f"{root}/256x256/photo/{RENDERED}/bat/n0_0.jpg", "photo", "bat", photo="bat/n0_0")
    assert found.sketches[3].path.endswith("bat/n0_1-2.png")
    assert found.sketches[3].photo == "bat/n0_1"
    assert found.pairs() == []  # it has no key points
    assert load("sketchy", root / "256x256").records == found.records
    write(root, f"256x256/photo/{RENDERED}/bat/a-1.jpg", f"256x256/sketch/{RENDERED}/bat/a-1-3.png")
    assert load("sketchy", root).sketches[0].photo == "bat/a-1"


def test_sketchy_with_the_extended_photos(tmp_path: Path) -> None:
    write(write_sketchy(tmp_path), "EXTEND_image_sketchy/cat/ext_1.jpg", "EXTEND_image_sketchy/cat/n0_0.jpg")
    for root in (tmp_path, tmp_path / "256x256"):
        found = load("sketchy", root, classes="seen")
        assert found.split == "Sketchy 104/21, seen (2 of 104 classes found), with the extended photos"
        assert [photo.photo for photo in found.photos] == [
            *("cat/n0_0", "cat/n0_1", "cat/ext_1", "cat/n0_0"),  # the same photo again has the same name
            *("horse/n0_0", "horse/n0_1"),
        ]
    assert load("sketchy", tmp_path, classes=["bat"]).split == "Sketchy, the classes bat"


def test_tuberlin(tmp_path: Path) -> None:
    found = load("tuberlin", write_tuberlin(tmp_path))
    assert found.classes == ("bus", "cat", "mouse (animal)")
    assert [Path(record.path).name for record in found.sketches] == ["9.png", "1.png", "2.png", "81.png"]
    assert not found.photos
    write(tmp_path, "ImageResized/mouse/n1_2.JPEG", "ImageResized/bus/a.jpg", "ImageResized/nothing/b.jpg")
    found = load("tuberlin", tmp_path)
    assert [(photo.label, photo.photo) for photo in found.photos] == [
        ("bus", "bus/a"),
        ("mouse (animal)", "mouse (animal)/n1_2"),
    ]
    assert load("tuberlin", tmp_path, classes="unseen").split == (
        "TU-Berlin 220/30, unseen (1 of 30 classes found), with the extended photos"
    )


def test_the_users_own_spelling_of_a_class_is_the_one_that_counts(tmp_path: Path) -> None:
    write(tmp_path, "png/hot_air_balloon/1.png", "ImageResized/hot-air-balloon/a.jpg")
    found = load("tuberlin", tmp_path)
    assert [record.label for record in found.records] == ["hot_air_balloon"] * 2


def test_classes_that_two_sets_have_in_common(tmp_path: Path) -> None:
    """Whatever their spelling, and under the names of the first; numbers and other scripts are told apart."""
    photos = load("sketchy", write_sketchy(tmp_path / "sketchy", ("cat", "hot-air_balloon", "teapot")))
    root = write_tuberlin(tmp_path / "tuberlin")
    write(root, "png/hot air balloon/3.png")
    found = load_common("tuberlin", root, photos.classes)
    assert found.classes == ("cat", "hot-air_balloon")
    assert [record.label for record in found.records] == ["cat", "cat", "hot-air_balloon"]
    assert found.split == "TU-Berlin, 2 of 3 classes"
    with pytest.raises(DataError, match="no class has the name of one of teapot"):
        load_common("tuberlin", root, ["teapot"])
    own = write(tmp_path / "own", *(f"sketch/{name}/1.png" for name in ("1", "2", "猫", "犬", "+")))
    assert load_common("folder", own, ["2", "犬", "-"]).classes == ("2", "犬")


def test_quickdraw_strokes_are_opened_where_their_line_begins(tmp_path: Path) -> None:
    lines = [line(1) + " \r", "", line(200, word="käse", recognized=False), line(3)]
    found = load("quickdraw", write_quickdraw(tmp_path, "cat", lines=lines))
    assert found.split == "Quick, Draw!, all classes (1 of 345 classes found)"
    assert [record.kind for record in found.records] == ["sketch"] * 3
    drawings = [record.open() for record in found.records]
    assert all(isinstance(drawing, Strokes) for drawing in drawings)
    assert [drawing.strokes[0][1, 0] for drawing in drawings] == [1, 200, 3]


def test_quickdraw_bitmaps_are_black_on_white(tmp_path: Path) -> None:
    bitmaps = np.zeros((3, 784), dtype=np.uint8)
    bitmaps[1, 5] = 255
    (tmp_path / "numpy_bitmap").mkdir()
    np.save(tmp_path / "numpy_bitmap/cat.npy", bitmaps)
    found = load("quickdraw", tmp_path)
    assert [record.row for record in found.records] == [0, 1, 2]
    opened = np.asarray(found.records[1].open())
    assert opened.shape == (28, 28, 3)
    assert opened[0, 5].tolist() == [0, 0, 0]
    assert (opened == 255).sum() == 3 * 783
    write_quickdraw(tmp_path, "cat")
    assert load("quickdraw", tmp_path).records[0].path.endswith(".ndjson")  # strokes come first


@pytest.mark.parametrize("kind", ["simplified", "numpy_bitmap"])
def test_quickdraw_has_parts_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert quickdraw.PARTS == {"train": (0, 70_000), "valid": (70_000, 72_500), "test": (72_500, 75_000)}
    monkeypatch.setattr(quickdraw, "PARTS", {"train": (0, 4), "valid": (4, 5), "test": (5, 7)})
    write_quickdraw(tmp_path, "cat", lines=[line(x) for x in range(10)])
    if kind == "numpy_bitmap":
        shutil.rmtree(tmp_path / "simplified")
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / "cat.npy", np.arange(10, dtype=np.uint8)[:, None].repeat(784, 1))
    shown = {}
    for part in ("train", "valid", "test"):
        found = load("quickdraw", tmp_path, part=part)
        assert found.split.endswith(f", {part} part")
        shown[part] = [
            opened.strokes[0][1, 0] if isinstance(opened, Strokes) else 255 - np.asarray(opened)[0, 0, 0]
            for opened in (record.open() for record in found.records)
        ]
    assert shown == {"train": [0, 1, 2, 3], "valid": [4], "test": [5, 6]}


def test_a_quickdraw_part_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "'cat' is empty: no drawing from number 72,500 on" in refused(
        "quickdraw", write_quickdraw(tmp_path, "cat"), part="test"
    )


def test_quickdraw_extended(tmp_path: Path) -> None:
    write(tmp_path, "QuickDraw_sketches_final/eiffel tower/1.png", "QuickDraw_sketches_final/fire_hydrant/2.png")
    write(tmp_path, "QuickDraw_images_final/eiffel tower/image_1.jpg", "QuickDraw_images_final/sea_turtle/image_2.jpg")
    found = load("quickdraw", tmp_path)
    assert found.classes == ("The Eiffel Tower", "fire hydrant")
    assert [(record.kind, record.label) for record in found.records] == [
        ("photo", "The Eiffel Tower"),
        ("sketch", "The Eiffel Tower"),
        ("sketch", "fire hydrant"),
    ]
    assert "parts are of simplified and numpy_bitmap" in refused("quickdraw", tmp_path, part="train")


def test_quickdraw_holds_no_drawing_while_it_scans(tmp_path: Path) -> None:
    long = json.dumps({"drawing": [[list(range(200)) * 50, list(range(200)) * 50]]})
    write_quickdraw(tmp_path, "cat", lines=[long] * 200)
    assert (tmp_path / "simplified/cat.ndjson").stat().st_size > 10_000_000
    import tracemalloc

    tracemalloc.start()
    found = load("quickdraw", tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.records) == 200
    assert most < 2_000_000


def test_psc6k(tmp_path: Path) -> None:
    found = load("psc6k", write_psc6k(tmp_path))
    assert found.split == "PSC6K, all 2 classes"
    assert (len(found.photos), len(found.sketches)) == (10, 20)
    pairs = found.pairs()
    assert len(pairs) == 20
    sketch, photo, names = next(pair for pair in pairs if pair[0].path.endswith("cat/n0_3-2.png"))
    assert (sketch.photo, photo.photo) == ("cat/n0_3", "cat/n0_3")
    assert names == tuple(f"2.{i}" for i in range(1, 9))
    assert sketch.points[0] == ("2.1", 42.5, 62.5)  # XB, YB
    assert ("2.1", 2.5, 22.5) in photo.points  # XA, YA
    assert ("1.1", 1.5, 21.5) in photo.points
    assert len(photo.points) == 16


def test_psc6k_is_split_by_photos_as_the_paper_does(tmp_path: Path) -> None:
    write_psc6k(tmp_path, photos=10)
    train, test = (load("psc6k", tmp_path, part=part) for part in ("train", "test"))
    assert [photo.photo for photo in train.photos if photo.label == "bat"] == [f"bat/n0_{i}" for i in range(6)]
    assert [photo.photo for photo in test.photos if photo.label == "bat"] == [f"bat/n0_{i}" for i in range(6, 10)]
    assert {sketch.photo for sketch in test.sketches} == {photo.photo for photo in test.photos}
    assert (len(train.records), len(test.records)) == (36, 24)
    assert test.split == "PSC6K, all 2 classes, test part of 60:40"
    write_psc6k(tmp_path, photos=1)
    assert "the part 'test' is empty" in refused("psc6k", tmp_path, part="test")


def test_psc6k_finds_its_images(tmp_path: Path) -> None:
    write_psc6k(tmp_path / "a")
    beside = load("psc6k", tmp_path / "a" / "PSC6K")
    assert beside == load("psc6k", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/PSC6K/test_pairs_ps.csv").rename(tmp_path / "b/test_pairs_ps.csv")
    (tmp_path / "a/Sketchy/rendered_256x256/256x256").rename(tmp_path / "b/256x256")
    assert len(load("psc6k", tmp_path / "b").records) == 30
    table = (tmp_path / "b/test_pairs_ps.csv").read_text()
    longer = table.replace("photo/tx", "rendered_256x256/256x256/photo/tx")
    (tmp_path / "b/test_pairs_ps.csv").write_text(longer)
    assert len(load("psc6k", tmp_path / "b").records) == 30


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("XA,YA", "X,YA", "lacks the column 'XA'"),
        ("8.5", "eight", "line 2: could not convert"),
        (";8.5", "", "line 2: zip()"),
        (";48.5", "", "line 2: zip()"),
        ("photo/", "\0", "is no table"),
    ],
)
def test_psc6k_says_what_is_wrong_with_its_table(tmp_path: Path, old: str, new: str, told: str) -> None:
    table = write_psc6k(tmp_path) / "PSC6K/test_pairs_ps.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    if new == "\0":
        table.write_bytes(b"\xff\xfe\x81 not text")
    assert told in refused("psc6k", tmp_path)


def test_psc6k_without_images(tmp_path: Path) -> None:
    write_psc6k(tmp_path)
    next((tmp_path / "Sketchy").rglob("n0_1-2.png")).unlink()
    assert "incomplete: 1 of 30 images are not there" in refused("psc6k", tmp_path)
    shutil.rmtree(tmp_path / "Sketchy")
    assert "but not the images of Sketchy, such as 256x256/photo/tx_000100000000/bat" in refused("psc6k", tmp_path)


def test_a_folder_of_photos_and_sketches(tmp_path: Path) -> None:
    found = load("folder", write_folder(tmp_path / "mine"))
    assert found.split == "Folder mine, all 2 classes"
    assert [(record.kind, Path(record.path).name, record.photo) for record in found.records] == [
        ("photo", "1.jpg", "mug/1"),
        ("photo", "a-b.webp", "mug/a-b"),
        ("sketch", "1-2.png", "mug/1"),
        ("sketch", "a-b.svg", "mug/a-b"),
        ("photo", "x.PNG", "pen/x"),
    ]


def test_a_plain_folder_holds_photos_but_for_drawings(tmp_path: Path) -> None:
    write(tmp_path, "mug/1.jpg", "mug/1-1.svg", "mug/notes.txt", "mug/2.svg", "pen/1.png", "__MACOSX/pen/1.png")
    found = load("folder", tmp_path)
    assert found.classes == ("mug", "pen")
    assert [(record.kind, Path(record.path).name, record.photo) for record in found.records] == [
        ("photo", "1.jpg", "mug/1"),
        ("sketch", "1-1.svg", "mug/1"),
        ("sketch", "2.svg", None),
        ("photo", "1.png", "pen/1"),
    ]
    assert "photos" not in found.split
    assert "all of them photos: drawings belong in sketch/<class>" in load("folder", tmp_path, classes=["pen"]).split


def test_a_record_is_made_of_what_a_table_holds(tmp_path: Path) -> None:
    one = Record(tmp_path / "x.png", "photo", "x", mask=tmp_path / "m.png", points=[["a", 1.0, 2.0]])  # type: ignore[arg-type]
    same = Record(str(tmp_path / "x.png"), "photo", "x", mask=str(tmp_path / "m.png"), points=(("a", 1.0, 2.0),))
    assert (one, hash(one)) == (same, hash(same))
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(DataError, match=r"x\.png: its kind is 'Sketch'"):
        Record("x.png", "Sketch", "x")  # type: ignore[arg-type]


def test_images_are_found_in_order_and_evenly(tmp_path: Path) -> None:
    names = [f"{folder}/{i}.{suffix}" for folder in "ba" for i in range(3) for suffix in ("JPG", "svg", "ndjson")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumbnail.png").touch()
    expected = [str(tmp_path / name) for name in sorted(names) if not name.endswith("ndjson")]
    assert find_images(tmp_path) == expected
    assert find_images(tmp_path, 100) == expected
    assert find_images(tmp_path, 4) == [expected[i] for i in (0, 3, 6, 9)]
    assert find_images(expected[0], 4) == expected[:1]


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scan = tmp_path / "closed", os.scandir
    closed.mkdir()
    (tmp_path / "a.png").touch()

    def refused(path: Any) -> Any:
        if os.fspath(path) == os.fspath(closed):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read everything
    for place in (tmp_path, closed):
        with pytest.raises(SketchFusionError, match="closed cannot be read: Permission denied"):
            find_images(place)


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/cat/1.png", "elsewhere/dog/2.png")
    links = tmp_path / "links"
    links.mkdir()
    (links / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (links / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "elsewhere/dog/back").symlink_to(links)
    (links / "gone.png").symlink_to(tmp_path / "nowhere.png")  # who opens it is told
    assert find_images(links) == [str(links / name) for name in ("cat/1.png", "dog/2.png", "gone.png")]


def test_voc(tmp_path: Path) -> None:
    found = load("voc", write_voc(tmp_path))
    assert found.classes == ("cat", "person", "sheep")  # what is difficult is void in the masks
    assert [(record.label, record.row, record.photo) for record in found.records] == [
        ("cat", 8, "2007_1"),
        ("person", 15, "2007_1"),
        ("sheep", 17, "2007_2"),
    ]
    assert load("voc", tmp_path, part="train").classes == ("cat", "person")
    assert load("voc", tmp_path, part="valid").split == "VOC, one class, valid part"
    assert [record.label for record in load("voc", tmp_path, classes=["sheep"]).records] == ["sheep"]


def test_voc_with_masks_of_objects(tmp_path: Path) -> None:
    found = load("voc", write_voc(tmp_path, "SegmentationObject"))
    assert [(record.label, record.row) for record in found.records] == [("cat", 1), ("person", 2), ("sheep", 2)]


def test_voc_by_meta_json(tmp_path: Path) -> None:
    found = load("voc", write_animals(tmp_path))
    (record,) = found.photos
    assert (record.label, record.row, record.photo) == ("cat", 8, "2007_1")
    assert record.points == (("nose", 10.0, 5.0),)  # of the larger cat, in this image's pixels, those on the image
    mask = record.read_mask()
    assert (mask.dtype, mask.shape, mask.sum()) == (np.bool_, (60, 80), 200)
    assert mask[:10, :20].all()
    assert "knows no parts" in refused("voc", tmp_path, part="train")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("images/2007_1.jpg", "incomplete: 1 files are not there"),
        ("masks/2007_1.png", "incomplete: 1 files are not there"),
    ],
)
def test_voc_without_a_file(tmp_path: Path, name: str, told: str) -> None:
    (write_animals(tmp_path) / name).unlink()
    assert told in refused("voc", tmp_path)


def test_voc_with_damaged_tables(tmp_path: Path) -> None:
    (write_animals(tmp_path / "a") / "meta.json").write_text("{")
    assert "meta.json cannot be read: JSONDecodeError" in refused("voc", tmp_path / "a")
    (tmp_path / "a/meta.json").write_text('{"items": [{}], "keypoint_names": []}')
    assert "meta.json cannot be read: KeyError: 'file'" in refused("voc", tmp_path / "a")
    (write_voc(tmp_path / "b") / "Annotations/2007_1.xml").write_text("<annotation>")
    assert "Annotations/2007_1.xml cannot be read" in refused("voc", tmp_path / "b")
    (tmp_path / "b/Annotations/2007_1.xml").unlink()
    (tmp_path / "b/SegmentationClass/2007_2.png").unlink()
    told = "incomplete: 2 files are not there, such as Annotations/2007_1.xml"
    assert told in refused("voc", tmp_path / "b")
    (tmp_path / "b/ImageSets/Segmentation/val.txt").unlink()
    assert "cannot be read: [Errno 2]" in refused("voc", tmp_path / "b", part="valid")


def test_a_mask_without_a_value_is_all_that_is_not_zero(tmp_path: Path) -> None:
    image = str(paint(tmp_path / "image.png"))
    for mode, colour in (("L", 255), ("1", 1), ("RGB", (0, 0, 9)), ("RGBA", (0, 0, 0, 255))):
        Image.new(mode, (8, 6), colour).save(tmp_path / "mask.png")
        mask = Record(image, "photo", "cat", mask=str(tmp_path / "mask.png")).read_mask()
        assert mask.shape == (6, 8)
        assert mask.all() == (mode != "RGBA")  # opaque black is black


def test_a_mask_of_more_than_256_objects(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 300]], np.uint16)).save(tmp_path / "mask.png")
    image = str(paint(tmp_path / "image.png"))
    mask = Record(image, "photo", "cat", mask=str(tmp_path / "mask.png"), row=300).read_mask()
    assert mask.tolist() == [[False, False, True]]


def test_shoes(tmp_path: Path) -> None:
    found = load("shoes", write_shoes(tmp_path))
    assert (found.classes, found.split, len(found.photos), len(found.sketches)) == (
        ("shoe",),
        "Shoes, one class",
        6,
        12,
    )
    assert found.photos[1].photo == "001"
    assert [sketch.photo for sketch in found.sketches[:3]] == ["000", "000", "001"]
    names, xs, ys = zip(*found.photos[0].points, strict=True)
    assert names == ("toe", "heel")
    assert xs == pytest.approx((10 + 0.1 * 40, 10 + 0.875 * 40))
    assert ys == pytest.approx((20 + 0.75 * 20, 20 + 0.5 * 20))
    outlier = found.sketches[1]
    assert outlier.path.endswith("000-2.png")
    assert [name for name, _, _ in outlier.points] == ["heel"]
    assert Counter(names for _, _, names in found.pairs()) == {("toe", "heel"): 11, ("heel",): 1}


def test_shoes_with_an_image_that_is_blank(tmp_path: Path) -> None:
    paint(write_shoes(tmp_path) / "photo/002.jpg", (64, 64), "white")
    found = load("shoes", tmp_path)
    assert [len(photo.points) for photo in found.photos] == [2, 2, 0, 2, 2, 2]
    assert len(found.pairs()) == 10


@pytest.mark.parametrize("name", ["photo/001.jpg", "sketch/001-2.png", "photo/006.jpg"])
def test_shoes_with_an_image_that_is_damaged(tmp_path: Path, name: str) -> None:
    """It would be missing from the pairs otherwise, and nobody would hear of it; even one that no box is known of."""
    write(write_shoes(tmp_path), name)
    with pytest.raises(ImageError) as caught:
        load("shoes", tmp_path)
    assert caught.value.source == f"{tmp_path}/{name}"


def test_shoes_that_are_incomplete(tmp_path: Path) -> None:
    (write_shoes(tmp_path) / "photo/003.jpg").unlink()
    assert "incomplete: 2 of 12 sketches, such as 003-1.png, lack their photo" in refused("shoes", tmp_path)
    for name in ("003-1", "003-2", "000-1"):
        (tmp_path / f"sketch/{name}.png").unlink()
    told = "incomplete: 4 of the 18 images in parts.json are not there, such as 003"
    assert told in refused("shoes", tmp_path)
    (tmp_path / "parts.json").write_text('{"parts": {"000": {"toe": [1, 2]}}}')
    assert "parts.json cannot be read: ValueError" in refused("shoes", tmp_path)
    (tmp_path / "parts.json").write_text("[]")
    assert "parts.json cannot be read: TypeError" in refused("shoes", tmp_path)
    (tmp_path / "parts.json").write_text('{"parts": {}}')
    for path in tmp_path.glob("*/*"):
        path.unlink()
    assert "no class is there, found parts.json, photo, sketch" in refused("shoes", tmp_path)


# What holds for every set


@pytest.mark.parametrize("name", NAMES)
def test_records_do_not_depend_on_how_the_root_is_written(tmp_path: Path, name: str) -> None:
    root = WRITERS[name](tmp_path / "root")
    found = load(name, root)
    assert load(name, str(root) + "/") == found
    assert isinstance(found.records, tuple)
    assert list(found.classes) == sorted({record.label for record in found.records})
    assert all(Path(record.path).is_file() for record in found.records)
    keys = [(record.label, record.kind) for record in found.records]
    assert keys == sorted(keys)


def test_pairs_have_a_photo_and_key_points_in_common() -> None:
    def record(kind: Any, photo: str | None, *names: str) -> Record:
        return Record(f"{kind}/{photo}", kind, "cat", photo=photo, points=tuple((name, 1.0, 2.0) for name in names))

    photos = [record("photo", "a", "ear", "nose"), record("photo", "b", "ear"), record("photo", None, "ear")]
    sketches = [
        record("sketch", "a", "tail", "nose", "ear"),
        record("sketch", "b", "nose"),
        record("sketch", "c", "ear"),
        record("sketch", None, "ear"),
        record("sketch", "a"),
    ]
    found = DataSet("folder", ("cat",), (*photos, *sketches), "")
    assert found.pairs() == [(sketches[0], photos[0], ("nose", "ear"))]


@pytest.mark.parametrize("name", NAMES)
def test_sets_pass_through_pickle(tmp_path: Path, name: str) -> None:
    found = load(name, WRITERS[name](tmp_path))
    assert pickle.loads(pickle.dumps(found)) == found


class Sizes:
    """A torch data set of how large a set's images are."""

    def __init__(self, found: DataSet):
        self.found = found

    def __len__(self) -> int:
        return len(self.found.records)

    def __getitem__(self, i: int) -> tuple[int, int]:
        return self.found.records[i].open().size


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_records_are_opened_in_workers(tmp_path: Path) -> None:
    found = load("quickdraw", write_quickdraw(tmp_path))
    batches = list(DataLoader(Sizes(found), batch_size=6, num_workers=1))  # type: ignore[arg-type]
    assert [size.tolist() for size in batches[0]] == [[256] * 6, [256] * 6]


@pytest.mark.parametrize("name", NAMES)
def test_a_root_that_is_not_there(tmp_path: Path, name: str) -> None:
    message = refused(name, tmp_path / "missing")
    assert "there is no such folder" in message
    assert "Expected in" in message
    assert "obtained from" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_root_that_is_a_file_an_archive_or_empty(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}.tar", "text.txt")
    assert "it is a file" in refused(name, tmp_path / "text.txt")
    assert "it is an archive: extract it" in refused(name, tmp_path / f"{name}.tar")
    assert f"but {name}.tar beside it (extract that first)" in refused(name, tmp_path / name)
    (tmp_path / name).mkdir()
    assert "found an empty folder" in refused(name, tmp_path / name)
    write(tmp_path / name, "a.tar", f"{name}.zip", "readme.md")
    assert f"(extract {name}.zip first)" in refused(name, tmp_path / name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "folder"])
def test_the_right_folder_is_named_where_it_is_above_or_below(tmp_path: Path, name: str) -> None:
    root = WRITERS[name](tmp_path / "above" / "root")
    below = {"sketchy": "256x256/photo", "tuberlin": "png", "quickdraw": "simplified", "psc6k": "Sketchy"}
    inside = root / below.get(name, "JPEGImages" if name == "voc" else "photo")
    for wrong in (tmp_path, tmp_path / "above", inside):
        message = refused(name, wrong)
        assert any(f"but {right} looks like it" in message for right in (root, root / "256x256")), message


def test_one_error_says_all_three_things(tmp_path: Path) -> None:
    write(tmp_path, *(f"{letter}.txt" for letter in "abcdefgh"))
    assert refused("sketchy", tmp_path) == (
        f"Sketchy: found a.txt, b.txt, c.txt, d.txt, e.txt, f.txt and 2 more. Expected in {tmp_path}: "
        f"256x256/photo/{RENDERED}/<class>/<photo>.jpg and 256x256/sketch/{RENDERED}/<class>/<photo>-<k>.png. "
        "The set is obtained from https://sketchy.eye.gatech.edu (Sketches and Photos, 256x256)"
    )


def test_a_half_extracted_sketchy(tmp_path: Path) -> None:
    write_sketchy(tmp_path)
    (tmp_path / f"256x256/photo/{RENDERED}/cat/n0_1.jpg").unlink()
    shutil.rmtree(tmp_path / f"256x256/photo/{RENDERED}/bat")
    shutil.rmtree(tmp_path / f"256x256/sketch/{RENDERED}/horse")
    message = refused("sketchy", tmp_path)
    assert "bat (0 photos, 4 sketches, 4 of them without their photo)" in message
    assert "cat (1 photos, 4 sketches, 2 of them without their photo)" in message
    assert "horse (2 photos, 0 sketches, 0 of them without their photo)" in message
    shutil.rmtree(tmp_path / "256x256/sketch")
    assert "found 256x256" in refused("sketchy", tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("tuberlin", "png/owl"), ("folder", "owl"), ("folder", "sketch/owl")])
def test_an_empty_class(tmp_path: Path, name: str, folder: str) -> None:
    write(tmp_path, "png/cat/1.png" if name == "tuberlin" else folder.replace("owl", "cat") + "/1.png")
    (tmp_path / folder).mkdir(parents=True)
    assert "the class 'owl' is empty" in refused(name, tmp_path)
    assert load(name, tmp_path, classes=["cat"]).classes == ("cat",)


def test_an_empty_class_of_quickdraw(tmp_path: Path) -> None:
    write_quickdraw(tmp_path, "cat", lines=["", ""])
    assert "the class 'cat' is empty" in refused("quickdraw", tmp_path)


def test_damaged_files_of_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "numpy_bitmap/cat.npy"
    write(tmp_path, "numpy_bitmap/cat.npy")
    assert "is no array of bitmaps" in refused("quickdraw", tmp_path)
    path.write_bytes(b"")
    assert "is no array of bitmaps" in refused("quickdraw", tmp_path)
    np.save(path, np.zeros((3, 784), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-5])
    assert "is no array of bitmaps" in refused("quickdraw", tmp_path)
    np.save(path, np.zeros((3, 100), dtype=np.uint8))
    assert "(3, 100), uint8" in refused("quickdraw", tmp_path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert "is no array of bitmaps" in refused("quickdraw", tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tuberlin(tmp_path)

    def forbidden(folder: Any) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", forbidden)
    message = refused("tuberlin", tmp_path)
    assert "cannot be read: [Errno 13] Permission denied" in message
    assert "obtained from" in message


def test_a_folder_beside_it_that_may_not_be_read_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a root that is none: what was found is said, and the right folder is still named."""
    (tmp_path / "another's").mkdir()
    write_tuberlin(tmp_path / "mine")
    real = os.scandir

    def guarded(folder: Any) -> Any:
        if Path(folder).name == "another's" or Path(folder).parent.name == "another's":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr("os.scandir", guarded)
    monkeypatch.setattr("os.path.isdir", lambda folder, real=os.path.isdir: "another's" in str(folder) or real(folder))
    message = refused("tuberlin", tmp_path)
    assert "found another's, mine" in message
    assert f"but {tmp_path / 'mine'} looks like it" in message


# Images that cannot be read


def test_a_damaged_image_is_named_when_it_is_opened(tmp_path: Path) -> None:
    record = load("sketchy", write_sketchy(tmp_path)).records[0]
    with pytest.raises(ImageError) as caught:
        record.open()
    assert caught.value.source == record.path
    Path(record.path).unlink()
    with pytest.raises(ImageError, match=r"bat/n0_0\.jpg"):
        record.open()


@pytest.mark.parametrize("last", ['{"drawing": [[[0', "{}", '{"drawing": []}', "\xff"])
def test_a_damaged_drawing_is_named_when_it_is_opened(tmp_path: Path, last: str) -> None:
    records = load("quickdraw", write_quickdraw(tmp_path, "cat", lines=[line(1), last])).records
    records[0].open()
    with pytest.raises(ImageError, match=rf"cat\.ndjson.*the line at byte {records[1].row}: ") as caught:
        records[1].open()
    assert caught.value.source == f"{tmp_path}/simplified/cat.ndjson"


def test_bitmaps_that_changed_since_are_named(tmp_path: Path) -> None:
    path = tmp_path / "numpy_bitmap/cat.npy"
    path.parent.mkdir()
    np.save(path, np.zeros((3, 784), dtype=np.uint8))
    record = load("quickdraw", tmp_path).records[2]
    np.save(path, np.zeros((2, 784), dtype=np.uint8))
    with pytest.raises(ImageError, match=r"cat\.npy.*row 2"):
        record.open()
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"cat\.npy"):
        record.open()
    path.unlink()
    with pytest.raises(ImageError, match=r"cat\.npy"):
        record.open()


def test_a_mask_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    record = load("voc", write_voc(tmp_path)).records[0]
    with pytest.raises(ImageError, match=r"SegmentationClass/2007_1\.png.*cannot be decoded") as caught:
        record.read_mask()
    assert caught.value.source == record.mask
    (tmp_path / "SegmentationClass/2007_1.png").unlink()
    with pytest.raises(ImageError, match=r"SegmentationClass/2007_1\.png"):
        record.read_mask()
    with pytest.raises(ImageError, match="it has no mask"):
        Record("a.png", "photo", None).read_mask()


# Classes


def test_the_class_lists_that_ship() -> None:
    for name, seen, unseen in (
        ("sketchy", 104, 21),
        ("tuberlin", 220, 30),
        ("quickdraw", 80, 30),
    ):
        lists = [class_names(f"{name}-{which}") for which in ("seen", "unseen")]
        assert [len(names) for names in lists] == [seen, unseen]
        assert {*lists[0]}.isdisjoint(lists[1])
        assert {*lists[0], *lists[1]} <= {*class_names(f"{name}-all")}
    assert {*class_names("sketchy-seen-100"), *class_names("sketchy-unseen-25")} == {*class_names("sketchy-all")}
    assert len(class_names("sketchy-unseen-25")) == 25
    counts = [len({*class_names(f"{name}-all")}) for name in ("sketchy", "tuberlin", "quickdraw")]
    assert counts == [125, 250, 345]
    assert {"scissors", "wheelchair", "songbird"} <= {*class_names("sketchy-unseen")}
    with pytest.raises(ConfigError, match="sketchy-unseen-25"):
        class_names("sketchy-unsen")


def test_what_mini_has_never_seen_is_a_fifth_of_the_seen_classes_and_whatever_has_their_names() -> None:
    held_out = class_names("sketchy-mini-unseen")
    assert held_out == class_names("sketchy-seen")[::5]
    words = [re.sub(r" ?\(.*\)", "", name.replace("_", " ")) for name in held_out]
    for name in ("tuberlin", "quickdraw"):
        named = {
            label for label in class_names(f"{name}-all") if any(re.search(rf"\b{word}\b", label) for word in words)
        }
        assert {*class_names(f"{name}-mini-unseen")} == named


def test_lists_take_what_is_there_and_say_how_much(tmp_path: Path) -> None:
    root = write_sketchy(tmp_path, ("bat", "cow", "door", "cat", "chicken"))
    unseen = load("sketchy", root, classes="unseen")
    assert (unseen.classes, unseen.split) == (
        ("bat", "cow", "door"),
        "Sketchy 104/21, unseen (3 of 21 classes found)",
    )
    assert {record.label for record in unseen.records} == {"bat", "cow", "door"}
    assert load("sketchy", root, classes="seen").classes == ("cat", "chicken")
    other = load("sketchy", root, classes="unseen-25")
    assert (other.classes, other.split) == (("chicken",), "Sketchy 100/25, unseen (1 of 25 classes found)")


def test_a_complete_list_is_not_counted(tmp_path: Path) -> None:
    root = write_sketchy(tmp_path, class_names("sketchy-unseen"), photos=1)
    found = load("sketchy", root, classes="unseen")
    assert found.split == "Sketchy 104/21, unseen"
    assert found.classes == class_names("sketchy-unseen")
    message = refused("sketchy", root, classes="seen")
    assert "none of the 104 classes of 'Sketchy 104/21, seen' is there, only bat, cabin, cow" in message


def test_classes_that_are_the_users_own_are_among_all(tmp_path: Path) -> None:
    found = load("sketchy", write_sketchy(tmp_path, ("bat", "teaspoon")))
    assert (found.classes, found.split) == (
        ("bat", "teaspoon"),
        "Sketchy, all classes (1 of 125 classes found)",
    )


def test_named_classes_have_to_be_there(tmp_path: Path) -> None:
    root = write_sketchy(tmp_path)
    found = load("sketchy", root, classes=["horse", "bat", "horse"])
    assert (found.classes, found.split) == (("bat", "horse"), "Sketchy, the classes bat, horse")
    message = refused("sketchy", root, classes=["bat", "hores", "cow", "qqq"])
    assert "no class 'hores' (nearest: horse" in message
    assert "'cow' (it is one of the set's, but its folder is not there)" in message
    assert "'qqq'" in message
    assert "'bat'" not in message
    assert "an empty list" in refused("sketchy", root, classes=[])


def test_classes_from_a_file(tmp_path: Path) -> None:
    root = write_sketchy(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("\ufeff# mine\nhorse\n\n  cat \r\nhorse\n", encoding="utf-8")
    for given_as in (names, str(names)):
        found = load("sketchy", root, classes=given_as)
        assert (found.classes, found.split) == (("cat", "horse"), "Sketchy, the 2 classes of names.txt")
    names.write_text("hrse\n")
    assert "'hrse' (nearest: horse" in refused("sketchy", root, classes=names)
    names.write_text("# nothing\n")
    assert "no class is named by the 0 classes of names.txt" in refused("sketchy", root, classes=names)
    names.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused("sketchy", root, classes=names)
    message = refused("sketchy", root, classes="unsen")
    assert "'unsen', nor one of all, mini-unseen, seen, seen-100, unseen, unseen-25" in message
    assert "'seen', nor one of all (" in refused("folder", write_folder(tmp_path / "mine"), classes="seen")


def test_what_load_does_not_know() -> None:
    with pytest.raises(ConfigError, match="did you mean sketchy") as caught:
        load("sketcy", ".")
    assert all(name in caught.value.legal for name in NAMES)
    with pytest.raises(ConfigError, match="has no part 'val'; legal: train, valid, test"):
        load("quickdraw", ".", part="val")
    with pytest.raises(ConfigError, match="legal: none"):
        load("sketchy", ".", part="train")


# The split by hash


def records(labels: int = 4, photos: int = 50, sketches: int = 3) -> tuple[Record, ...]:
    return tuple(
        record
        for label in map(str, range(labels))
        for i in range(photos)
        for record in (
            Record(f"/set/photo/{label}/{i}.jpg", "photo", label, photo=f"{label}/{i}"),
            *(Record(f"/set/{label}/{i}-{k}.png", "sketch", label, photo=f"{label}/{i}") for k in range(sketches)),
            Record("/set/x.ndjson", "sketch", label, row=i),
            Record(f"/set/tu/{label}/{i}.png", "sketch", label),
        )
    )


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 9), data=st.data())
def test_the_side_of_a_record_does_not_depend_on_the_others(share: float, seed: int, data: st.DataObject) -> None:
    everything = records(labels=2, photos=20)
    kept, held_out = split(everything, share, seed)
    assert sorted([*kept, *held_out], key=everything.index) == list(everything)
    some = data.draw(st.permutations(everything))[: data.draw(st.integers(0, len(everything)))]
    again = split(some, share, seed)
    assert again == (
        tuple(record for record in some if record in kept),
        tuple(record for record in some if record in held_out),
    )


def test_the_share_held_out_is_that_of_each_label() -> None:
    for share in (0.2, 0.5):
        kept, held_out = split(records(photos=400), share)
        for label in "0123":
            counts = [sum(record.label == label for record in side) for side in (kept, held_out)]
            assert counts[1] / sum(counts) == pytest.approx(share, abs=0.06)
    assert split(records(), 0) == (records(), ())
    assert split(records(), 1) == ((), records())
    assert split((), 0.5) == ((), ())


def test_larger_shares_hold_out_more_of_the_same() -> None:
    small, large = ({*split(records(), share)[1]} for share in (0.1, 0.4))
    assert small < large


def test_what_was_drawn_from_one_photo_falls_on_its_side() -> None:
    kept, held_out = split(records(), 0.3)
    sides = [{record.photo for record in side if record.photo} for side in (kept, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert all(sides)


def test_sketches_held_out_stay_so_in_a_part_of_the_set() -> None:
    records = tuple(Record(f"{label}{i}.png", "sketch", label) for label in "abc" for i in range(25))
    whole, few = (DataSet("folder", tuple("abc"), part, "x") for part in (records, records[::2]))
    kept, apart = split_sketches(whole, 0.2)
    assert {record.label for record in apart.records} == set("abc")
    assert not set(kept.records) & set(apart.records)
    assert set(split_sketches(few, 0.2)[1].records) <= set(apart.records)
    one = DataSet("folder", ("a",), records[:1], "x")
    assert [part.records for part in split_sketches(one, 0.2)] == [one.records] * 2


def test_rows_of_a_file_are_told_apart_and_seeds_and_folders_count_as_they_should() -> None:
    rows = tuple(Record("a/x.ndjson", "sketch", "cat", row=row) for row in range(1000))
    kept, held_out = split(rows, 0.3)
    assert 250 < len(held_out) < 350
    assert split(rows, 0.3, seed=1)[1] != held_out
    elsewhere = tuple(Record("b/x.ndjson", "sketch", "cat", row=row) for row in range(1000))
    assert [record.row for record in split(elsewhere, 0.3)[1]] == [record.row for record in held_out]
    assert len(kept) + len(held_out) == 1000


def test_the_split_is_the_same_for_ever() -> None:
    rows = tuple(Record("x.npy", "sketch", "cat", row=row) for row in range(12))
    assert [record.row for record in split(rows, 0.5)[1]] == EVER


EVER = [1, 2, 3, 8, 10, 11]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_are_from_0_to_1(share: float) -> None:
    with pytest.raises(ConfigError, match="0 to 1"):
        split(records(), share)


# Real data


@pytest.fixture(scope="module")
def extracted(data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`extracted("sketchy", "bat")` is the set's root with the members that have one of the words in their names."""

    def extract(name: str, *words: str) -> Path:
        target = tmp_path_factory.mktemp(name)
        with tarfile.open(data(name)) as tar:
            chosen = [m for m in tar if m.isfile() and (not words or any(f"/{word}" in m.name for word in words))]
            tar.extractall(target, members=chosen, filter="data")
        return target

    return extract


def test_real_sketchy(extracted: Callable[..., Path], data: Callable[[str], Path]) -> None:
    found = load("sketchy", extracted("sketchy", "hot-air_balloon/", "zebra/"), classes="seen")
    assert found.split == "Sketchy 104/21, seen (2 of 104 classes found)"
    assert (len(found.photos), len(found.sketches)) == (50, 50)
    assert all(record.open().size == (256, 256) for record in (*found.photos[:3], *found.sketches[:3]))
    with tarfile.open(data("sketchy")) as tar:
        folders = {name.split("/")[3] for name in tar.getnames() if name.count("/") == 4}
    assert folders == {*class_names("sketchy-seen")}


def test_real_tuberlin(extracted: Callable[..., Path], data: Callable[[str], Path]) -> None:
    found = load("tuberlin", extracted("tuberlin", "bear (animal)/", "zebra/"))
    assert found.classes == ("bear (animal)", "zebra")
    assert len(found.sketches) == 128
    found.sketches[-1].open()
    with tarfile.open(data("tuberlin")) as tar:
        folders = {name.split("/")[1] for name in tar.getnames() if name.count("/") == 2}
    assert folders <= {*class_names("tuberlin-all")}


def test_real_quickdraw(extracted: Callable[..., Path]) -> None:
    found = load("quickdraw", extracted("quickdraw"))
    assert {*found.classes} <= {*class_names("quickdraw-all")}
    assert len(found.records) == 25 * len(found.classes)
    assert all(isinstance(record.open(), Strokes) for record in found.records[::40])


def test_real_animals(extracted: Callable[..., Path]) -> None:
    found = load("voc", extracted("voc_animals"))
    assert found.split == "VOC, all 4 classes"
    for record in found.photos[::60]:
        width, height = record.open().size
        mask = record.read_mask()
        assert mask.shape == (height, width)
        assert 0 < mask.mean() < 1
        assert all(0 <= x <= width and 0 <= y <= height for _, x, y in record.points)
        assert not record.points or np.mean([mask[int(y) - 1, int(x) - 1] for _, x, y in record.points]) > 0.5


def test_real_shoes(extracted: Callable[..., Path]) -> None:
    found = load("shoes", extracted("shoes"))
    assert (len(found.photos), len(found.sketches)) == (203, 609)
    pairs = found.pairs()
    assert len(pairs) == 609
    assert 0.95 < sum(len(names) for _, _, names in pairs) / (4 * 609) < 1
    for record in found.records:
        width, height = (136, 102) if record.kind == "photo" else (256, 256)
        assert all(0 <= x <= width and 0 <= y <= height for _, x, y in record.points)
        places = {name: x for name, x, _ in record.points}
        if "toe_cap" in places and "heel" in places:
            assert places["toe_cap"] < places["heel"]  # all shoes look to the left
