"""Writes a package of simple drawings, so that no test needs npm."""

import json
from collections.abc import Mapping
from pathlib import Path

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


def write_package(folder: Path, groups: Mapping[str, str] = GROUPS) -> Path:
    """Concepts (by default six) in three styles, the waving hand in three skin tones, and one that the Unicode table
    lacks; returns the folder."""
    colours = ("#c22", "#2a2", "#22c", "#28a", "#a82", "#fc4", "#808")
    for i, concept in enumerate([*groups, "nameless thing"]):
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
    table = {str(i): {"slug": c.replace(" ", "_"), "group": g} for i, (c, g) in enumerate(groups.items())}
    (folder / "data-by-emoji.json").write_text(json.dumps(table))
    (folder / "package.json").write_text('{"version": "9.9.9"}')
    return folder
