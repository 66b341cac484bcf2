"""Looks through a folder of images as the official scorer would, for what the scorer itself does not notice: scorers
average over what they find."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem, Size, SourceImage, reading
from emma_train.evaluate.image_folder import ImageFolder
from emma_train.evaluate.writer import file_sizes_of

BLANK_LEVELS = 2
"""An image whose channels vary by no more levels of 255 is blank."""
EQUAL_LEVELS = 0.5
"""An edit that differs from its source by a smaller mean of levels is the source, stored again."""


@dataclass(frozen=True)
class ImageProblem:
    """Something that would make a score wrong."""

    kind: str
    path: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}" + f" ({self.detail})" * bool(self.detail)


class ImageCheck:
    """Finds everything that is wrong with the images of some items."""

    def __init__(self, benchmark: Benchmark, folder: ImageFolder, size: Size) -> None:
        """`size`: (height, width) of an image of the model."""
        self.benchmark, self.folder, self.size = benchmark, folder, size
        self._path_of_digest: dict[bytes, str] = {}

    def problems(self, items: Sequence[BenchmarkItem]) -> Iterator[ImageProblem]:
        """What is wrong with the files of these items, and files beside them. Raises UserError where a source cannot be
        read."""
        expected: set[str] = set()
        for item, size in zip(items, file_sizes_of(self.benchmark, items, self.size), strict=True):
            companions = self.benchmark.companions(item)
            for path, content in companions.items():
                yield from self._companion_problems(path, content)
            files = self.benchmark.image_files(item)
            for path in files:
                yield from self._image_problems(path, size, item.reference)
            expected |= companions.keys() | files.keys()
        yield from self._extra_files(expected)
        if self.benchmark.index_file:
            yield from self._index_problems(items)

    def _image_problems(self, path: str, size: Size, reference: SourceImage | None) -> Iterator[ImageProblem]:
        try:
            image = _decoded(self.folder.images / path)
        except FileNotFoundError:
            yield ImageProblem("missing", path)
            return
        except (OSError, ValueError, SyntaxError) as error:
            yield ImageProblem("unreadable", path, str(error)[:100])
            return
        if (image.format, image.mode) != ("PNG", "RGB"):
            yield ImageProblem("wrong format", path, f"{image.format} {image.mode}, not PNG RGB")
            return
        if (image.height, image.width) != size:
            wanted = f"{size[1]} x {size[0]}"
            yield ImageProblem("wrong size", path, f"{image.width} x {image.height}, not {wanted}")
            return
        for name, part in _parts(path, np.asarray(image), self.benchmark.is_grid):
            yield from self._pixel_problems(name, part)
        if reference is not None:
            with reading(reference):
                difference = _difference(image, _decoded(io.BytesIO(reference.read())))
            if difference < EQUAL_LEVELS:
                yield ImageProblem("equal to its source", path)

    def _pixel_problems(self, name: str, pixels: np.ndarray) -> Iterator[ImageProblem]:
        """Blank images, and images that were there before."""
        levels = pixels.reshape(-1, 3)
        if int((levels.max(0) - levels.min(0)).max()) <= BLANK_LEVELS:
            yield ImageProblem("blank", name)
        elif (first := self._path_of_digest.setdefault(hashlib.sha256(pixels.tobytes()).digest(), name)) != name:
            yield ImageProblem("equal images", name, f"the same as {first}")

    def _companion_problems(self, path: str, content: bytes) -> Iterator[ImageProblem]:
        target = self.folder.images / path
        if not target.is_file():
            yield ImageProblem("missing", path)
        elif not _is_same(target, content):
            yield ImageProblem("wrong content", path, "it is not what the benchmark's files say")

    def _extra_files(self, expected: set[str]) -> Iterator[ImageProblem]:
        """Files and empty folders that no item has; scorers may count them, or stop at them."""
        root = self.folder.images
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            is_left = not any(path.iterdir()) if path.is_dir() else name not in expected
            if is_left and not any(fnmatch(name, pattern) for pattern in self.benchmark.scorer_files):
                yield ImageProblem("extra", name)

    def _index_problems(self, items: Sequence[BenchmarkItem]) -> Iterator[ImageProblem]:
        name = self.benchmark.index_file
        path, wanted = self.folder.out / name, self.folder.index(self.benchmark, items)
        if not path.is_file():
            yield ImageProblem("missing", name)
        elif not _is_same(path, json.dumps(wanted).encode()):
            yield ImageProblem("wrong content", name, "it is not the index of these images; write them again")


def _decoded(source: Path | io.BytesIO) -> Image.Image:
    """A decoded image. Raises OSError, ValueError, SyntaxError."""
    with Image.open(source) as image:
        image.load()
        return image


def _parts(path: str, pixels: np.ndarray, is_grid: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The images of a file, as the scorer cuts them, with their names."""
    if not is_grid:
        yield path, pixels
        return
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    for number in range(4):
        top, left = number // 2 * height, number % 2 * width
        yield f"{path} cell {number}", np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _difference(image: Image.Image, source: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    resized = source.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(image, np.int16) - np.asarray(resized, np.int16)).mean())


def _is_same(path: Path, content: bytes) -> bool:
    """Whether a file has the same pixels, or the same JSON, as `content`."""
    try:
        if path.suffix == ".png":
            images = (_decoded(path), _decoded(io.BytesIO(content)))
            return images[0].mode == images[1].mode and np.array_equal(np.asarray(images[0]), np.asarray(images[1]))
        return bool(json.loads(path.read_bytes()) == json.loads(content))
    except (OSError, ValueError, SyntaxError):
        return False
