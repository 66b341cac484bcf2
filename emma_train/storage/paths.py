"""Where checkpoints lie: a folder, or a place in a store that fsspec opens (s3://bucket/runs/NAME, gs://..., ...).

A folder is a pathlib.Path and a place in a store a UPath, which has the same methods. Two things set stores apart: they
rename nothing at once, so a checkpoint there is what has a meta.json (folder.py), and they may fail for a while, which
must not pass for a file that is not there. fsspec's exists(), is_file(), is_dir() and glob() take any error for a no;
what decides about a checkpoint asks with the functions here instead.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from upath import UPath

from emma_train.errors import RunError, UserError

StoragePath = Path | UPath


def of(path: str | StoragePath) -> StoragePath:
    """The place that a person names by a path or a URL. Raises UserError where no installed package opens the URL."""
    if not isinstance(path, str):
        return path
    if "://" not in path or path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    url = urlsplit(path)
    if url.password is not None or url.query:
        shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        raise UserError(
            f"{shown}: the URL must hold no password and no query, for it is written to logs and checkpoints; "
            "credentials come from the provider's usual places"
        )
    try:
        # Other processes write there too, so what a listing said a moment ago is not asked for.
        place = UPath(path.rstrip("/"), use_listings_cache=False)
        place.fs  # noqa: B018 - imports what opens it
    except ImportError as error:
        extra = "pip install 'emma-train[s3]'" if url.scheme in ("s3", "s3a") else "install fsspec's package for it"
        raise UserError(f"{path}: {url.scheme}:// needs a package that is not installed ({error}); {extra}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is no store that fsspec opens ({error})") from None
    return place


@contextmanager
def asking(place: StoragePath) -> Iterator[None]:
    """Within, a store fails with RunError, which leaves out its own words: they may hold secrets. That a file is not
    there passes as FileNotFoundError, and every error of a folder as it is."""
    try:
        yield
    except (FileNotFoundError, RunError):
        raise
    except Exception as error:
        if isinstance(place, Path):
            raise
        raise RunError(f"{place}: the store fails ({_told(error)})") from None


def there(file: StoragePath) -> bool:
    """Whether there is such a file. Raises RunError where a store does not say."""
    if isinstance(file, Path):
        return file.is_file()
    try:
        with asking(file):
            return bool(file.fs.info(file.path)["type"] == "file")
    except FileNotFoundError:
        return False


def children(folder: StoragePath) -> list[StoragePath]:
    """What lies in a folder; nothing where it is not there. Raises RunError likewise."""
    if isinstance(folder, Path):
        return list(folder.glob("*"))
    try:
        with asking(folder):
            names = folder.fs.ls(folder.path, detail=False)
    except FileNotFoundError:
        return []
    return [folder / name.rstrip("/").rpartition("/")[2] for name in names]


def size(file: StoragePath) -> int:
    """Bytes of a file. Raises OSError, or RunError likewise."""
    if isinstance(file, Path):
        return file.stat().st_size
    with asking(file):
        return int(file.fs.info(file.path)["size"])


def sizes(folder: StoragePath) -> dict[str, int]:
    """Bytes of the files below a place in a store, by their path in it: a thousand at a request. What it lacks may be
    there all the same. Nothing for a folder, which is asked file by file."""
    if isinstance(folder, Path):
        return {}
    with asking(folder):
        found = folder.fs.find(folder.path, detail=True)
    return {path.removeprefix(f"{folder.path}/"): int(info["size"]) for path, info in found.items()}


def check(place: StoragePath, probe: str) -> None:
    """Write, read and remove the file `probe` in a store; of a folder nothing is asked. Raises UserError where no
    checkpoints can be kept there, and RunError where the store fails."""
    if isinstance(place, Path):
        return
    file, text = place / probe, b"can this be written?"
    try:
        with asking(place):
            place.fs.pipe_file(file.path, text)
            found = place.fs.cat_file(file.path)
            place.fs.rm_file(file.path)
    except FileNotFoundError:
        raise UserError(f"{place}: there is no such bucket, or it cannot be written to") from None
    except RunError as error:
        if _is_for_good(error.__context__):
            raise UserError(str(error)) from None
        raise
    if found != text:
        raise UserError(f"{place}: does not give back what is written there")


def _is_for_good(error: BaseException | None) -> bool:
    """Whether it is the user who has to do something."""
    return isinstance(error, (PermissionError, NotImplementedError)) or "Credential" in type(error).__name__


def _told(error: Exception) -> str:
    """What happened, without the texts of others."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, Exception):
        error = error.__context__  # torch's zip writer hides it behind a complaint about positions
    if isinstance(error, PermissionError):
        return "access is denied"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}, {os.strerror(number)}" if isinstance(number, int) else type(error).__name__
