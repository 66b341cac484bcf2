"""`decontaminate`: whether a record repeats a benchmark: a prompt of it by 13-grams of words, an image by its hash.

`--set prompts=FILE,FILE` names files of benchmark prompts and questions: text with one a line, or JSON (lines) whose
strings all count. `--set hashes=FILE` names lists of perceptual hashes of benchmark images, 16 hexadecimal digits a
line; `--set images=FOLDER` hashes the images of a folder. `max_bits` is the distance at which two images are the same.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.operators.phash import perceptual_hash
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.shards.images import EXTENSIONS
from emma_train.errors import UserError

GRAM = 13
"""Words of a run that make a text contaminated. A shorter prompt must be equal to a whole text, of MIN_WORDS words or
more: "a dog" is in half of all captions."""
MIN_WORDS = 4


def word_list(text: str) -> list[str]:
    """Lower-case words; Chinese, Japanese and Korean characters are words of their own."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+", text.lower())


def grams(text: str) -> set[str]:
    """The runs of GRAM words of a text; of a shorter text with at least MIN_WORDS words, the text."""
    words = word_list(text)
    if len(words) < GRAM:
        return {" ".join(words)} if len(words) >= MIN_WORDS else set()
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


class HashList:
    """Perceptual hashes, searched by distance: banded, so that a look-up compares few of them."""

    def __init__(self, hashes: Iterable[str], max_bits: int) -> None:
        """Two hashes that differ in at most `max_bits` bits are equal in one of max_bits + 1 bands."""
        self.max_bits = max_bits
        self._bands: list[dict[int, list[int]]] = [{} for _ in band_masks(max_bits + 1)]
        for value in sorted({int(text, 16) for text in hashes}):
            for mask, band in zip(band_masks(max_bits + 1), self._bands, strict=True):
                band.setdefault(value & mask, []).append(value)

    def nearest(self, text: str) -> tuple[int, str] | None:
        """(bits that differ, hash) of the nearest hash within `max_bits`, or None."""
        value = int(text, 16)
        near = {
            other
            for mask, band in zip(band_masks(self.max_bits + 1), self._bands, strict=True)
            for other in band.get(value & mask, ())
        }
        bits, nearest = min((((value ^ other).bit_count(), other) for other in near), default=(65, 0))
        return (bits, f"{nearest:016x}") if bits <= self.max_bits else None


def band_masks(num: int, bits: int = 64) -> list[int]:
    """Masks that cut a hash into bands."""
    edges = [bits * i // num for i in range(num + 1)]
    return [((1 << end) - 1) ^ ((1 << start) - 1) for start, end in zip(edges, edges[1:], strict=False)]


def _start(settings: Mapping[str, Any]) -> Annotate:
    benchmark = {gram: path for path in settings["prompts"] for text in _texts(Path(path)) for gram in grams(text)}
    hashes = [line for path in settings["hashes"] for line in _hash_lines(Path(path))]
    hashes += [perceptual_hash(path.read_bytes()) for folder in settings["images"] for path in _image_files(folder)]
    if not benchmark and not hashes:
        raise UserError(
            "decontaminate: knows no benchmark; give --set prompts=[FILE], hashes=[FILE] or images=[FOLDER]"
        )
    known = HashList(hashes, settings["max_bits"])

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        gram = next((gram for text in record.texts() for gram in sorted(grams(text)) if gram in benchmark), None)
        image = None
        if hashes:
            images = (known.nearest(perceptual_hash(data)) for data in record.images.values())
            image = next((match[1] for match in images if match), None)
        return {
            "contaminated": bool(gram or image),
            "prompt": gram,
            "prompt_file": Path(benchmark[gram]).name if gram else None,
            "image_hash": image,
        }

    return for_each_record(annotate_one)


def _texts(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"decontaminate: prompts {path}: cannot be read ({error})") from None
    if path.suffix not in (".json", ".jsonl"):
        yield from content.splitlines()
        return
    try:
        values = (
            [json.loads(content)] if path.suffix == ".json" else map(json.loads, filter(str.strip, content.split("\n")))
        )
        for value in values:
            yield from _strings(value)
    except ValueError as error:
        raise UserError(f"decontaminate: prompts {path}: is no {path.suffix[1:]} ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _hash_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"decontaminate: hashes {path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"[0-9a-f]{16}", line):
            raise UserError(f"decontaminate: hashes {path}: entry {number}, {line!r}, is no hash of 16 digits")
    return lines


def _image_files(folder: str) -> list[Path]:
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix[1:].lower() in EXTENSIONS)
    if not files:
        raise UserError(f"decontaminate: images {folder}: no image in it")
    return files


DECONTAMINATE = Operator(
    "decontaminate",
    1,
    {"contaminated": pa.bool_(), "prompt": pa.string(), "prompt_file": pa.string(), "image_hash": pa.string()},
    _start,
    {"prompts": [], "hashes": [], "images": [], "max_bits": 6},
    files=frozenset(("prompts", "hashes", "images")),
)
"""prompt: the run of words that a benchmark has too; image_hash: of the benchmark image."""
