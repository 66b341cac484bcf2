"""A package of simple drawings, so that no test needs npm."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.emoji.drawings import Catalogue, read_catalogue

Records = list[tuple[str, str, dict[str, Any], dict[str, bytes]]]

GROUPS = {
    "red circle": "Symbols",
    "green box": "Objects",
    "police car light": "Travel & Places",
    "blue fish": "Animals & Nature",
    "wide bar": "Objects",
    "waving hand": "People & Body",
}
TONES = ("default", "light", "dark")


def svg(fill: str, shape: int, outline: bool) -> str:
    paint = f'fill="none" stroke="{fill}" stroke-width="3"' if outline else f'fill="{fill}"'
    shapes = (
        '<circle cx="16" cy="16" r="12"',
        '<rect x="5" y="5" width="22" height="22"',
        '<path d="M4 28L16 4L28 28Z"',
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{shapes[shape % 3]} {paint}/></svg>'


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six concepts in three styles, one of them in three skin tones, and one that the Unicode table lacks."""
    folder = tmp_path_factory.mktemp("package")
    colours = ("#c22", "#2a2", "#22c", "#28a", "#a82", "#fc4", "#808")
    for i, concept in enumerate([*GROUPS, "nameless thing"]):
        for style in ("flat", "modern", "high-contrast"):
            tones: tuple[str | None, ...] = (None,)
            if concept == "waving hand":
                tones = TONES if style != "high-contrast" else ("default",)
            for j, tone in enumerate(tones):
                name = concept.replace(" ", "-") + (f"-{tone}" if tone else "")
                path = folder / "icons" / style / f"{name}.svg"
                path.parent.mkdir(parents=True, exist_ok=True)
                fill = "#000" if style == "high-contrast" else colours[(i + j) % 7]
                path.write_text(svg(fill, i + (style == "modern"), style == "high-contrast"))
    table = {str(i): {"slug": c.replace(" ", "_"), "group": g} for i, (c, g) in enumerate(GROUPS.items())}
    (folder / "data-by-emoji.json").write_text(json.dumps(table))
    (folder / "package.json").write_text('{"version": "9.9.9"}')
    return folder


@pytest.fixture(scope="session")
def catalogue(package: Path) -> Catalogue:
    return read_catalogue(package, package / "data-by-emoji.json")


@pytest.fixture(scope="session")
def read_set() -> Callable[[Path], Records]:
    """(split, key, record, images) of every record of a set."""

    def read(folder: Path) -> Records:
        records = []
        for shard in sorted(folder.glob("*/*.tar")):
            parts: dict[str, dict[str, bytes]] = {}
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, part = member.name.partition(".")
                    stream = tar.extractfile(member)
                    assert stream is not None
                    parts.setdefault(key, {})[part] = stream.read()
            for key, files in parts.items():
                records.append((shard.parent.name, key, json.loads(files.pop("json")), files))
        return records

    return read
