"""Stamps of Tux Paint (Debian: tuxpaint-stamps-default): images with a caption in English and many languages.

name.txt has the English caption in its first line, then lines such as `zh_CN.utf8=...`. Captions in other languages
are answers of i2t only: whether a model draws from Chinese without having learned it is a question of the paper (§5).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipelines.prepare.importers.conversation import question_turns
from data_pipelines.prepare.importers.image_files import read_file
from data_pipelines.prepare.importers.image_folder import image_paths_below
from data_pipelines.prepare.importers.item import ImportedSample, ImportOptions, ImportPart, Outcome, outcome
from data_pipelines.prepare.importers.source_files import relative_name
from data_pipelines.shards.record import CAPTION_QUESTION

LANGUAGES = {
    "zh_CN": "simplified Chinese",
    "zh_TW": "traditional Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "ru": "Russian",
    "ar": "Arabic",
    "hi": "Hindi",
}
"""Code of a line -> name in the question; other languages are left out."""


def tuxpaint_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each folder that has stamps: images with a text of the same name."""
    stamps = [path for path in image_paths_below(source) if path.with_suffix(".txt").is_file()]
    folders = sorted({path.parent for path in stamps})
    return [ImportPart(relative_name(folder, source), partial(_read, folder)) for folder in folders]


def _read(folder: Path, start: int) -> Iterator[Outcome]:
    for path in sorted(folder.glob("*.png"))[start:]:
        yield outcome(path.name, {}, partial(_stamp, path))


def _stamp(path: Path) -> ImportedSample:
    try:
        lines = read_file(path.with_suffix(".txt")).decode().splitlines()
    except FileNotFoundError:
        raise ValueError(f"no {path.stem}.txt with its captions") from None
    captions = stamp_captions(lines)
    if "en" not in captions:
        raise ValueError("no English caption")
    i2t = []
    for code, caption in captions.items():
        question = CAPTION_QUESTION if code == "en" else f"Describe this picture in {LANGUAGES[code]}."
        i2t += [{"images": ["img0"], "turns": turns} for turns in question_turns(question, [caption])]
    record = {"i2t": i2t, "t2i": [{"target": "img0", "text": captions["en"]}]}
    columns = {"num_languages": sum("=" in line for line in lines) + 1}
    return ImportedSample(path.stem, record, {"img0": read_file(path)}, columns=columns)


def stamp_captions(lines: list[str]) -> dict[str, str]:
    """Captions by language: `en`, the first line, and those of LANGUAGES."""
    captions = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
    for line in lines[1:]:
        code, equals, caption = line.partition("=")
        code = code.strip().removesuffix(".utf8")
        if equals and code in LANGUAGES and caption.strip():
            captions[code] = caption.strip()
    return captions
