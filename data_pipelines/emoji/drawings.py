"""Reads the drawings of the npm package `fluentui-emoji`: names, styles, skin tones, Unicode groups and pixels."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import resvg_py
from PIL import Image

from emma_train.errors import UserError

STYLES = ("flat", "modern", "high-contrast")
TONES = ("default", "light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True)
class Drawing:
    """One SVG of the package. `tone` is None for a concept without skin tones, `group` for one that is not in the
    Unicode table."""

    concept: str
    style: str
    tone: str | None
    group: str | None
    path: Path

    @property
    def id(self) -> str:
        """`style/name` as the package spells it, for instance `flat/waving-hand-dark`."""
        return f"{self.style}/{self.path.stem}"


@dataclass(frozen=True)
class Catalogue:
    """All drawings of a package folder, sorted by concept, style and tone; `unmatched` are concepts without a group."""

    drawings: tuple[Drawing, ...]
    unmatched: tuple[str, ...]
    version: str


def read_catalogue(package: Path, unicode_table: Path) -> Catalogue:
    """Read a package folder (`icons/STYLE/*.svg`), and the group of each concept from the Unicode table.

    Raises UserError if the folder has no drawings or the table cannot be read.
    """
    files = {style: sorted((package / "icons" / style).glob("*.svg")) for style in STYLES}
    if not any(files.values()):
        raise UserError(f"{package}: no icons/STYLE/*.svg in it; give the unpacked npm package fluentui-emoji")
    groups = read_groups(unicode_table)
    toned = {path.stem.removesuffix("-default") for paths in files.values() for path in paths if is_default(path)}
    drawings = []
    unmatched = set()
    for style, paths in files.items():
        for path in paths:
            name, tone = split_tone(path.stem, toned)
            group = groups.get(name.replace("-", "_"))
            concept = name.replace("-", " ")
            if group is None:
                unmatched.add(concept)
            drawings.append(Drawing(concept, style, tone, group, path))
    drawings.sort(key=lambda d: (d.concept, STYLES.index(d.style), TONES.index(d.tone or "default")))
    return Catalogue(tuple(drawings), tuple(sorted(unmatched)), package_version(package))


def read_groups(table: Path) -> dict[str, str]:
    """Slug -> Unicode group, from `data-by-emoji.json` of the npm package `unicode-emoji-json`."""
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))
        return {row["slug"]: row["group"] for row in rows.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{table}: not a readable Unicode table ({error!r}); give data-by-emoji.json of unicode-emoji-json"
        ) from error


def package_version(package: Path) -> str:
    """The version its `package.json` states, or `unknown`."""
    try:
        return str(json.loads((package / "package.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def is_default(path: Path) -> bool:
    return path.stem.endswith("-default")


def split_tone(stem: str, toned: set[str]) -> tuple[str, str | None]:
    """`waving-hand-dark` -> (`waving-hand`, `dark`). Only names with a `-default` drawing have tones, so
    `police-car-light` is not split."""
    for tone in sorted(TONES, key=len, reverse=True):
        base = stem.removesuffix(f"-{tone}")
        if base != stem and base in toned:
            return base, tone
    return stem, None


def select_drawings(
    drawings: Iterable[Drawing], concepts: frozenset[str] | None, tones: frozenset[str] | None
) -> list[Drawing]:
    """The drawings of these concepts and tones (None: all). Raises UserError if a wanted concept has no drawing."""
    kept = [
        d
        for d in drawings
        if (concepts is None or d.concept in concepts) and (tones is None or d.tone is None or d.tone in tones)
    ]
    missing = (concepts or frozenset()) - {d.concept for d in kept}
    if missing:
        raise UserError(f"the package has no drawing of {', '.join(sorted(missing))}; use fluentui-emoji 1.3.0")
    return kept


@lru_cache(maxsize=4096)
def rasterise(path: Path, side: int) -> Image.Image:
    """The drawing as an RGBA image of side x side pixels. The image is cached: do not modify it.

    Raises UserError on a broken SVG.
    """
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=path.read_text(encoding="utf-8"), width=side, height=side, skip_system_fonts=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable SVG ({error}); fetch the package again") from error
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)
