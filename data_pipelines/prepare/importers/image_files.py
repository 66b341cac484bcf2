"""Finds images by the relative paths that annotations give: in folders and in zip files."""

import posixpath
import zipfile
from pathlib import Path

from emma_train.errors import UserError

MAX_IMAGE_BYTES = 256 << 20
"""A larger file or member of a zip is refused before it is read."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How members of a zip may be compressed: the other methods unpack in steps whose size nothing limits."""


class ImageFiles:
    """Files of some folders and zips, by relative path; the first that has a path wins. Opens zips when first used."""

    def __init__(self, *locations: Path) -> None:
        self.locations = locations
        self._zips: dict[Path, zipfile.ZipFile] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"locations": self.locations, "_zips": {}}

    def read(self, name: object) -> bytes:
        """The bytes of a file. Raises ValueError where there is none, or its path leads out of the folder."""
        if not isinstance(name, str) or not name:
            raise ValueError("the path of an image is no text")
        path = posixpath.normpath(name.replace("\\", "/"))
        if path.startswith(("/", "../")) or path == ".." or "\0" in path:
            raise ValueError(f"{name}: a path that leads out of the folder of images")
        for location in self.locations:
            data = self._zip_member(location, path) if location.suffix == ".zip" else self._file(location, path)
            if data is not None:
                return data
        raise ValueError(f"{name}: no such image in {', '.join(location.name for location in self.locations)}")

    def _file(self, folder: Path, path: str) -> bytes | None:
        try:
            return read_file(folder / path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None

    def _zip_member(self, file: Path, path: str) -> bytes | None:
        if file not in self._zips:
            try:
                self._zips[file] = zipfile.ZipFile(file)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{file}: no zip that can be read ({error}); copy it again") from None
        archive = self._zips[file]
        for name in (path, f"{file.stem}/{path}", path.removeprefix(f"{file.stem}/")):
            try:
                info = archive.getinfo(name)
            except KeyError:
                continue
            if info.file_size > MAX_IMAGE_BYTES:
                raise ValueError(f"{path}: {info.file_size:,} bytes unpacked, more than {MAX_IMAGE_BYTES:,}")
            if info.compress_type not in METHODS:
                raise ValueError(f"{path}: compressed by method {info.compress_type}; zip the images with deflate")
            try:
                with archive.open(info) as member:  # a member that unpacks to more than it says fails its checksum
                    return member.read(info.file_size)
            except Exception as error:  # zlib, struct and encryption have errors of their kinds
                raise ValueError(f"{path}: cannot be unpacked ({type(error).__name__}: {error})") from None
        return None


def read_file(path: Path) -> bytes:
    """The bytes of an image or text file. Raises ValueError where it is too large, and OSError."""
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise ValueError(f"{path.name}: {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
    return path.read_bytes()


def images_beside(file: Path, option: str) -> ImageFiles:
    """The images of an annotation file: those of the option `--images`, or else beside it, in `images` and in zips.

    Raises UserError where the option names nothing.
    """
    if option:
        location = Path(option)
        if not location.is_dir() and not zipfile.is_zipfile(location):
            raise UserError(f"--images {location}: neither a folder nor a zip; give the folder of the images")
        return ImageFiles(location)
    folder = file.parent
    return ImageFiles(folder, folder / "images", *sorted(folder.glob("*.zip")))
