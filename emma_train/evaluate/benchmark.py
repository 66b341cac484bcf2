"""What a benchmark is: items with prompts, perhaps with source images, and the files that its official scorer reads."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from emma_train.errors import UserError, describe_shortage
from emma_train.sequence.seeds import seed_of

ORIENTATION_TAG = 0x0112

Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class SourceImage:
    """An image to be edited: an image file, or a row of a column of a parquet file."""

    path: Path
    column: str = ""
    row: int = 0

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
        if not self.column:
            return self.path.read_bytes()
        number, rows = _row_group(self.path, self.row)
        content = _images_of_row_group(self.path, number, self.column)[self.row - rows]
        if not isinstance(content, bytes):
            raise OSError(f"row {self.row} has no {self.column}")
        return content

    def size(self) -> Size:
        """(height, width) as people see the image, after its EXIF orientation. Raises OSError."""
        with Image.open(io.BytesIO(self.read())) as image:
            width, height = image.size
            turned = image.format != "PNG" and image.getexif().get(ORIENTATION_TAG, 1) >= 5
        return (width, height) if turned else (height, width)


@contextmanager
def reading(source: SourceImage) -> Iterator[None]:
    """Turn what a source raises that cannot be read or decoded into a UserError."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, LookupError) as error:
        if describe_shortage(error) is not None:
            raise
        which = f" (row {source.row})" if source.column else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path}{which}: the image cannot be read ({reason}); download it again") from None


def _row_group(path: Path, row: int) -> tuple[int, int]:
    """The row group of a row, and the number of rows before it."""
    first = 0
    for number, num_rows in enumerate(_row_groups(path)):
        if row < first + num_rows:
            return number, first
        first += num_rows
    raise OSError(f"{path}: has no row {row}")


@lru_cache(maxsize=64)
def _row_groups(path: Path) -> list[int]:
    """Number of rows of each row group."""
    import pyarrow.parquet

    meta = pyarrow.parquet.ParquetFile(path).metadata
    return [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]


@lru_cache(maxsize=2)
def _images_of_row_group(path: Path, number: int, column: str) -> list[bytes]:
    """The images of a row group: one that was read serves all of its rows. Hugging Face stores {bytes, path}."""
    import pyarrow.parquet

    values = pyarrow.parquet.ParquetFile(path).read_row_group(number, [column])[column].to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


@dataclass(frozen=True)
class BenchmarkItem:
    """One prompt, or one edit, of a benchmark."""

    number: int
    """In the order of the official files, from 0."""
    name: str
    """The official name, unique within the benchmark; the seeds depend on it."""
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The official entry."""
    source: SourceImage | None = None
    """The image that the model edits."""
    reference: SourceImage | None = None
    """The image with which a judge compares the edit, whose size the edit takes."""


ReadItems = Callable[[Path, str], list[BenchmarkItem]]
Companions = Callable[[BenchmarkItem], dict[str, bytes]]


def no_companions(item: BenchmarkItem) -> dict[str, bytes]:
    return {}


@dataclass(frozen=True)
class Benchmark:
    """The layout of a benchmark. Paths are relative to the folder of images."""

    name: str
    read_items: ReadItems
    """(folder with the official files, language or "") -> items. Raises UserError."""
    image_path: str
    """Format of an image's path, with `item` and `sample`."""
    num_items: int
    """Of the official set."""
    score: Callable[..., Any]
    """Official statistics of what the scorer wrote: a ScoreFiles (official_scores.py)."""
    num_samples: int = 1
    """Images of an item."""
    is_grid: bool = False
    """The samples of an item are one file, 2 x 2 without borders."""
    languages: tuple[str, ...] = ()
    companions: Companions = no_companions
    """Path -> content of the further files of an item."""
    scorer_files: tuple[str, ...] = ()
    """Patterns of files that the scorer writes among the images."""
    index_file: str = ""
    """A JSON file {prompt: absolute path of its image} beside the folder of images."""

    def image_files(self, item: BenchmarkItem) -> dict[str, tuple[int, ...]]:
        """Path of each image file of an item -> the samples that it shows."""
        samples = tuple(range(self.num_samples))
        if self.is_grid:
            return {self.image_path.format(item=item, sample=0): samples}
        return {self.image_path.format(item=item, sample=sample): (sample,) for sample in samples}

    def seed(self, item: BenchmarkItem, sample: int) -> int:
        """Seed of an image's noise: it depends on benchmark, item and sample alone."""
        return seed_of(0, 0, f"{self.name}/{item.name}/{sample}", "benchmark")
