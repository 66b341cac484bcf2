"""The folder of a benchmark's images: what is in it, and writing files that appear complete or not at all.

OUT/settings.json     what the images depend on
OUT/images/           the official layout and nothing else
OUT/unfinished/       files that are being written, so that no scorer can see one
OUT/sheet.png         some of the images
"""

import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem, Size
from emma_train.storage.files import make_folder


class ImageFolder:
    """Files of OUT/images by their paths within it."""

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out, self.images = out, out / "images"
        self._unfinished = out / "unfinished"
        self._draft = self._unfinished / f"rank-{rank}-{os.getpid()}"

    def prepare(self) -> None:
        """Make the folders. Raises UserError."""
        make_folder(self.images)
        make_folder(self._unfinished)

    def write(self, path: str, content: bytes) -> None:
        """A file, which replaces an older one at once. It is not flushed to the disk: a resumed run opens every file,
        and writes again what cannot be read. Raises UserError where the path lies outside of the folder."""
        target = self.images / path
        if not target.resolve().is_relative_to(self.images.resolve()):
            raise UserError(f"{path}: lies outside of {self.images}; do not trust the benchmark's files")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._draft.write_bytes(content)
        os.replace(self._draft, target)

    def has_image(self, path: str, size: Size) -> bool:
        """Whether there is an image of this (height, width) that can be decoded."""
        try:
            with Image.open(self.images / path) as image:
                image.load()
                return (image.height, image.width) == size
        except (OSError, ValueError, SyntaxError):
            return False

    def has_file(self, path: str, content: bytes) -> bool:
        try:
            return (self.images / path).read_bytes() == content
        except OSError:
            return False

    def index(self, benchmark: Benchmark, items: Sequence[BenchmarkItem]) -> dict[str, str]:
        """Prompt -> absolute path of its image."""
        paths = {item.prompt: self.images / next(iter(benchmark.image_files(item))) for item in items}
        return {prompt: str(path.resolve()) for prompt, path in paths.items()}

    def clean(self) -> None:
        """Remove what a killed run left unfinished; for the end, when no rank writes any more."""
        shutil.rmtree(self._unfinished, ignore_errors=True)


def png(image: Image.Image | np.ndarray) -> bytes:
    """The PNG file of an image."""
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, "PNG")
    return content.getvalue()


def grid_of(cells: list[np.ndarray]) -> np.ndarray:
    """Four images of one size as 2 x 2, row by row, without borders."""
    return np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)], axis=0)
