"""Writes shards: plain WebDataset tars. The same records give the same bytes, and no incomplete shard remains."""

import io
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import webdataset
from PIL import Image

Record = dict[str, Any]


def webp(image: Image.Image, quality: int) -> bytes:
    """The image as lossy WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def compact_json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def tar_writer(stream: BinaryIO) -> webdataset.TarWriter:
    """Writes a shard; with a fixed time and user, so that its bytes only depend on the records."""
    return webdataset.TarWriter(stream, user="emma", group="emma", mtime=0, encoder=False)


class ShardWriter:
    """Writes records to `folder/PREFIX-000000.tar`, ... A shard has the suffix `.tmp` until it is complete.

    A shard is closed at `max_samples` records, or once it has `max_bytes` of content.
    """

    def __init__(self, folder: Path, prefix: str = "shard", max_samples: int = 1000, max_bytes: int = 256 << 20):
        self.folder = folder
        self.prefix = prefix
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        self.shards: list[Path] = []
        self.samples = 0
        self._stream: BinaryIO | None = None
        self._tar: webdataset.TarWriter | None = None
        self._open_samples = 0
        self._open_bytes = 0

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None and self._stream is not None:
            self._tar.close()
            self._stream.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, key: str, record: Record, images: dict[str, bytes]) -> None:
        """Append one record; `images` maps `img0`, ... to WebP bytes. A key has no dots: they end keys."""
        if "." in key or "/" in key:
            raise ValueError(f"key {key!r} has a dot or a slash")
        if self._tar is None:
            self._start()
        assert self._tar is not None
        parts = {f"{name}.webp": data for name, data in images.items()}
        self._open_bytes += self._tar.write({"__key__": key, "json": compact_json(record), **parts})
        self._open_samples += 1
        self.samples += 1
        if self._open_samples >= self.max_samples or self._open_bytes >= self.max_bytes:
            self._finish()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_suffix(".tar.tmp")

    def _start(self) -> None:
        self._stream = self._temporary.open("wb")
        self._tar = tar_writer(self._stream)
        self._open_samples = 0
        self._open_bytes = 0

    def _finish(self) -> None:
        if self._tar is None or self._stream is None:
            return
        self._tar.close()
        self._stream.close()
        self._temporary.rename(self._path)
        self.shards.append(self._path)
        self._tar = self._stream = None
