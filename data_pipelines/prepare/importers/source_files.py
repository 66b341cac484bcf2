"""Lists the files of a source folder, in an order that depends on their names alone."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.shards.excluded import refuse_names
from emma_train.errors import UserError


def source_files(source: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files below a folder with one of these suffixes, or the file itself; hidden folders are left out.

    Raises UserError where the source is missing, or a path is of the excluded set.
    """
    check_source(source)
    if source.is_file():
        return [source] if source.name.endswith(tuple(suffixes)) else []
    files = [path for path in source.rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    return sorted(files, key=lambda path: path.relative_to(source).parts)


def check_source(source: Path) -> None:
    """Raise UserError where a source is missing or its path is of the excluded set."""
    refuse_names([source.absolute().as_posix()], source)
    scheme, is_url, path = source.as_posix().partition(":/")
    if is_url:
        command = _fetch(scheme, path)
        raise UserError(f"{source}: is a URL; import reads local folders and files, so fetch it first: {command}")
    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; give the folder that was downloaded, such as by `hf download "
            "--repo-type dataset NAME --local-dir FOLDER`"
        )


def _fetch(scheme: str, path: str) -> str:
    """The command that copies a URL to a local folder."""
    path = path.lstrip("/")
    host, _, repository = path.partition("/")
    if scheme == "hf" or host == "huggingface.co":
        name = (path if scheme == "hf" else repository).removeprefix("datasets/").split("/tree/")[0]
        return f"hf download --repo-type dataset {name} --local-dir FOLDER"
    commands = {
        "s3": f"aws s3 sync s3://{path} FOLDER",
        "gs": f"gcloud storage rsync -r gs://{path} FOLDER",
        "http": f"wget -r -np -P FOLDER http://{path}",
        "https": f"wget -r -np -P FOLDER https://{path}",
    }
    return commands.get(scheme, f"rclone copy {scheme}://{path} FOLDER")


def relative_name(path: Path, source: Path) -> str:
    """The path of a file below its source, with slashes."""
    return path.name if path == source else path.relative_to(source).as_posix()


def config_name(path: Path, source: Path) -> str:
    """The part of a hub's data set that a file is of: the folders above it in the source, or the source itself for a
    file at its top, without `data`."""
    folders = path.relative_to(source).parent.parts if path != source else ()
    return "/".join(folder for folder in folders or (path.absolute().parent.name,) if folder != "data")


def listing_sha256(source: Path) -> str:
    """Hash of the relative paths and sizes of all files of a source; their content is not read."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    lines = (f"{relative_name(path, source)}\0{path.stat().st_size}\n" for path in files)
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()
