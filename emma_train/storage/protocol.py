"""What checkpoints and shards need of storage. Implementations: local_storage.py and object_storage.py.

The two kinds differ in one thing: a local folder can be renamed at once, a folder in an object store cannot. So a local
folder is written under another name and renamed when it is complete; in an object store a folder is written under its
final name and counts as complete once it has the file META, which is written last and removed first.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

META = "meta.json"
"""File of a published folder that describes its other files."""
Location = TypeVar("Location")
File = TypeVar("File", contravariant=True)


class ReadStorage(Protocol[File]):
    """Reading files: all that shards need."""

    def read(self, file: File) -> bytes:
        """The content of a file."""

    def read_range(self, file: File, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises StorageError where the file ends before."""

    def size(self, file: File) -> int:
        """Bytes of a file."""


class Storage(ReadStorage[Location], Protocol[Location]):
    """Files and published folders. A missing file is a FileNotFoundError. Other failures are an OSError of a local
    folder and a StorageError of an object store."""

    can_rename: bool
    """Whether a written folder can get its name afterwards."""

    def open(self, file: Location) -> AbstractContextManager[BinaryIO]:
        """A file to read from start to end."""

    def create(self, file: Location) -> AbstractContextManager[BinaryIO]:
        """A new file to write from start to end; it is flushed to disk at the end."""

    def write(self, file: Location, content: bytes) -> None:
        """Replace a file at once: it never has a part of the content."""

    def exists(self, file: Location) -> bool:
        """Whether there is such a file."""

    def listdir(self, folder: Location) -> list[Location]:
        """Files and folders in a folder; empty where the folder does not exist."""

    def listed_sizes(self, folder: Location) -> dict[str, int]:
        """Bytes of files below a folder by relative path, where one request lists many. May be incomplete: a missing
        entry must be checked by itself."""

    def has_folder(self, folder: Location) -> bool:
        """Whether there is such a folder; in an object store, whether it is published."""

    def make_folder(self, folder: Location, parents: bool = False) -> None:
        """Make a folder, and with `parents` those above it, where the storage has folders."""

    def unpublished(self, folder: Location) -> Location:
        """Where a folder is written before it is published."""

    def start_folder(self, folder: Location) -> Location:
        """Make the empty folder that `publish` will give the name `folder`; what a crash left of it is removed. Raises
        OSError where the parent of a local folder is missing: an unmounted disk must not be written to."""

    def publish(self, written: Location, folder: Location, meta: str) -> None:
        """Make a written folder complete under the name `folder`: write META, then rename. A published folder of that
        name is replaced."""

    def set_aside(self, folder: Location) -> Location:
        """Rename a damaged folder (in an object store its META) so that it is not used but can be inspected. Returns
        what has the new name."""

    def remove(self, folder: Location) -> None:
        """Remove a folder. A crash in between leaves nothing that looks complete."""

    def discard(self, folder: Location) -> None:
        """Remove an unpublished folder as far as possible, without an error."""

    def download(self, folder: Location, target: Path) -> None:
        """Copy a folder to a new local one."""

    def check_writable(self, folder: Location, probe: str) -> None:
        """Write, read and remove the file `probe` in an object store; nothing is tried in a local folder, which the
        run folder's own files prove. Raises UserError or StorageError."""
