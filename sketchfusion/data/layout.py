"""What the loaders share: the folders of a published set, its class lists, and the errors where they do not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..errors import ConfigError
from .records import DataError, Record

LISTS = Path(__file__).parent / "classes"
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".tif", ".tiff", ".webp")
ARCHIVES = (".tar", ".zip", ".7z", ".tgz", ".gz", ".xz", ".bz2", ".rar")

Classes = str | os.PathLike | Sequence[str]


class Among(tuple[str, ...]):
    """Class names, however spelled, of which those that are there are taken: what another set has."""


@dataclass(frozen=True)
class Published:
    """A data set as it is published.

    Attributes:
        name: what `load` calls it.
        title: what people call it.
        layout: what its root folder holds, for the message of an error.
        source: where it is obtained, likewise.
        parts: the parts that its images are divided into, where they are.
    """

    name: str
    title: str
    layout: str
    source: str
    parts: tuple[str, ...] = ()

    def error(self, root: Path, problem: str) -> DataError:
        return DataError(
            f"{self.title}: {problem}. Expected in {root}: {self.layout}. The set is obtained from {self.source}"
        )

    def check(self, root: Path, fits: Callable[[Path], bool]) -> None:
        """Raise a DataError that says what is there, and which folder near by may be meant, unless the root fits."""
        if fits(root):
            return
        meant = next((near for near in _near(root) if _readable(near, fits)), None)
        hint = f", but {meant} looks like it: pass that" if meant is not None else ""
        raise self.error(root, f"{self.found(root)}{hint}")

    def found(self, root: Path) -> str:
        """What is at the root, in words."""
        if root.is_dir():
            names = sorted(os.listdir(root))
            packed = sorted((name for name in names if name.endswith(ARCHIVES)), key=lambda name: self.name not in name)
            content = listed(names) if names else "an empty folder"
            return f"found {content}" + (f" (extract {packed[0]} first)" if packed else "")
        if root.exists():
            return (
                "it is an archive: extract it, and pass the folder" if root.name.endswith(ARCHIVES) else "it is a file"
            )
        packed = [root.name + kind for kind in ARCHIVES if root.with_name(root.name + kind).is_file()]
        return "there is no such folder" + (f", but {packed[0]} beside it (extract that first)" if packed else "")

    def choose(self, root: Path, present: Collection[str], classes: Classes) -> tuple[tuple[str, ...], str]:
        """The classes that were asked for, of those present -> (they, sorted; what they are, in words).

        `"all"`, `"seen"`, `"unseen"` and the other lists that ship with the package take what is there of them;
        names, and the names in a file, have to be there.
        """
        lists = {path.stem.removeprefix(f"{self.name}-"): path for path in LISTS.glob(f"{self.name}-*.txt")}
        official = _names(lists["all"])[1] if "all" in lists else ()
        if not present:
            raise self.error(root, f"no class is there, {self.found(root)}")
        if classes == "all" and not official:
            return tuple(sorted(present)), f"{self.title}, " + _counted(len(present), "all")
        if isinstance(classes, str) and classes in lists:
            words, wanted = _names(lists[classes])
            chosen = set(present) if classes == "all" else {*present} & {*wanted}
            if not chosen:
                raise self.error(
                    root, f"none of the {len(wanted)} classes of {words!r} is there, only {listed(sorted(present))}"
                )
            there = len(chosen & {*wanted})
            if there < len(wanted):
                words += f" ({there} of {len(wanted)} classes found)"
            return tuple(sorted(chosen)), words
        if isinstance(classes, Among):
            theirs = {letters(name) for name in classes}
            common = tuple(sorted(name for name in present if letters(name) in theirs))
            if not common:
                raise self.error(
                    root, f"no class has the name of one of {listed(classes)}, only {listed(sorted(present))}"
                )
            return common, f"{self.title}, {len(common)} of {len(classes)} classes"
        names, words = self._named(root, classes, sorted({"all", *lists}))
        if not names:
            raise self.error(root, f"no class is named by {words}")
        if lost := [name for name in names if name not in present]:
            raise self.error(root, f"no class {listed(_suggested(lost, {*present}, {*official}))}")
        return tuple(sorted({*names})), f"{self.title}, {words}"

    def _named(self, root: Path, classes: Classes, lists: Sequence[str]) -> tuple[Sequence[str], str]:
        """Names, or a file of names -> (the names, what they are in words); `lists` could have been asked for."""
        if not isinstance(classes, str | os.PathLike):
            return classes, f"the classes {listed(sorted({*classes}))}" if classes else "an empty list"
        path = Path(classes)
        if not path.is_file():
            known = ", ".join(lists)
            raise self.error(
                root, f"no file of class names {str(path)!r}, nor one of {known} (in Python names go in a list)"
            )
        try:
            _, names = _names(path)
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(root, f"the class names in {path} cannot be read: {error}") from None
        return names, _counted(len({*names}), "the") + f" of {path.name}"


def _names(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file of class names, one a line, -> (its first comment, they). Comments begin with `#`."""
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    return "".join(comments[:1]), tuple(line for line in lines if line and not line.startswith("#"))


def _suggested(lost: Iterable[str], present: set[str], official: set[str]) -> list[str]:
    """Each name with what is the matter with it."""
    said = []
    for name in lost:
        near = get_close_matches(name, sorted(present | official), n=3)
        if name in official:
            said.append(f"{name!r} (it is one of the set's, but its folder is not there)")
        else:
            said.append(f"{name!r} (nearest: {', '.join(near)})" if near else f"{name!r}")
    return said


def images(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the image files in a folder, sorted, but for hidden ones; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGES and name[0] != ".")


def folders(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the folders in a folder, sorted, but for hidden ones; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and entry.name[0] != "." and entry.name != "__MACOSX"
        )


def letters(name: str) -> str:
    """What two sets' spellings of a class have in common, letters and digits: hot-air_balloon, hot air balloon."""
    return re.sub(r"[\W_]", "", name.casefold()) or name


def respelled(names: Iterable[str], official: Iterable[str], others: Mapping[str, str]) -> dict[str, str]:
    """Folders that spell a set's classes in other ways -> {class: folder}; folders of no class are left out.

    Compared by their letters, the last spelling of a class counts; `others` gives, in small letters, what differs in
    those too.
    """

    spelled = {letters(name): name for name in official}
    found = ((spelled.get(others.get(letters(name), letters(name))), name) for name in names)
    return {label: name for label, name in found if label is not None}


def class_names(name: str) -> tuple[str, ...]:
    """A list of class names that ships with the package, such as `"sketchy-unseen"`.

    Raises:
        ConfigError: no such list.
    """
    path = LISTS / f"{name}.txt"
    if not path.is_file():
        legal = ", ".join(sorted(path.stem for path in LISTS.glob("*.txt")))
        raise ConfigError("name", f"no list of classes is called {name!r}", legal=legal)
    return _names(path)[1]


def photos_in(folder: Path, label: str) -> list[Record]:
    """The photos in a class's folder, each named after its file."""
    return [
        Record(f"{folder}/{name}", "photo", label, photo=f"{label}/{name.rpartition('.')[0]}")
        for name in images(folder)
    ]


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _near(root: Path) -> Iterator[Path]:
    """Folders that may be meant: above the root, then in it, then one deeper."""
    yield from list(root.absolute().parents)[:4]
    inside = _inside(root)[:100]
    yield from inside
    for folder in inside:
        yield from _inside(folder)[:10]


def _inside(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in folders(folder)]
    except OSError:  # somebody else's
        return []


def _readable(near: Path, fits: Callable[[Path], bool]) -> bool:
    try:
        return fits(near)
    except OSError:
        return False


def _counted(count: int, which: str) -> str:
    return "one class" if count == 1 else f"{which} {count} classes"
