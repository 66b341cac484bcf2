"""Reads the records of a foreign tar for an importer: each has a key of its own and every member once."""

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.prepare.importers.item import Reject
from data_pipelines.shards.excluded import refuse_key
from data_pipelines.shards.tar import BrokenTar, Group, groups


def tar_groups(path: Path, start: int) -> Iterator[Group | Reject]:
    """The records of a tar from number `start` on; a reject for one that occurs again or has a member twice, and at
    the end a reject without a count where the tar breaks off. Raises UserError where a key is of the excluded set."""
    keys: set[str] = set()
    try:
        with open(path, "rb") as file:
            for number, group in enumerate(groups(file)):
                is_repeated = group.key in keys
                keys.add(group.key)
                if number < start:
                    continue
                refuse_key(group.key, path)
                if is_repeated:
                    yield Reject(group.key, f"its key occurs twice in {path.name}")
                elif group.repeated:
                    yield Reject(group.key, f"it has two members {group.repeated[0]}")
                else:
                    yield group
    except BrokenTar as error:
        yield Reject(path.name, f"broken tar, it {error}; copy it again", 0)
    except OSError as error:
        yield Reject(path.name, f"cannot be read ({error.strerror})", 0)
