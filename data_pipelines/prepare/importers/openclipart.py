"""Open Clip Art (Debian: openclipart-png): drawings in named folders; name and folders are the caption."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipelines.prepare.importers.image_files import read_file
from data_pipelines.prepare.importers.image_folder import image_paths_below
from data_pipelines.prepare.importers.item import ImportedSample, ImportOptions, ImportPart, Outcome, outcome
from data_pipelines.prepare.importers.source_files import relative_name


def openclipart_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each folder that has drawings."""
    folders = sorted({path.parent for path in image_paths_below(source)})
    return [ImportPart(relative_name(folder, source), partial(_read, folder, source)) for folder in folders]


def _read(folder: Path, source: Path, start: int) -> Iterator[Outcome]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg"))
    for path in files[start:]:
        yield outcome(path.name, {}, partial(_drawing, path, source))


def _drawing(path: Path, source: Path) -> ImportedSample:
    words = words_of(path.stem)
    if not words:
        raise ValueError("a file name without words")
    category = [words_of(step) for step in path.parent.relative_to(source).parts if step not in ("png", "clipart")]
    caption = f"a drawing of {words}" + (f" ({', '.join(filter(None, category))})" if any(category) else "")
    columns = {"category": "/".join(filter(None, category))}
    return ImportedSample(relative_name(path, source), {}, {"img0": read_file(path)}, (caption,), columns)


def words_of(name: str) -> str:
    """The words of a file name, without its numbers: `red_apple_01` -> `red apple`."""
    return " ".join(word for word in re.split(r"[\W_]+", name.lower()) if word and not word.isdigit())
