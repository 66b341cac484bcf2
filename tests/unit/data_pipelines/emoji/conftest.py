"""The catalogue of the drawings, and the records of a set."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.emoji.drawings import Catalogue, read_catalogue

Records = list[tuple[str, str, dict[str, Any], dict[str, bytes]]]


@pytest.fixture(scope="session")
def catalogue(package: Path) -> Catalogue:
    return read_catalogue(package, package / "data-by-emoji.json")


@pytest.fixture(scope="session")
def read_set() -> Callable[[Path], Records]:
    """(split, key, record, images) of every record of a set."""

    def read(folder: Path) -> Records:
        records = []
        for shard in sorted(folder.glob("*/*.tar")):
            parts: dict[str, dict[str, bytes]] = {}
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, part = member.name.partition(".")
                    stream = tar.extractfile(member)
                    assert stream is not None
                    parts.setdefault(key, {})[part] = stream.read()
            for key, files in parts.items():
                records.append((shard.parent.name, key, json.loads(files.pop("json")), files))
        return records

    return read
