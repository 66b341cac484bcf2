"""Local checkpoints: what a node keeps of the newest state in a folder of its disk or memory.

train.local_folder/NAME-DIGEST/step-00000100/     one node's part of a local checkpoint
    meta.json                         metadata of the complete checkpoint: size and SHA-256 of the files of all ranks
    weights/ optimizer/               DCP files of this node's ranks, and copies of the files of the node before it

DIGEST is of the location of the run's checkpoints, so runs of one name do not meet. A file `local-start` beside the
run's checkpoints names the start whose local checkpoints count: an older start may have gone another way.
"""

import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from emma_train.checkpoint.nodes import Nodes, this_node
from emma_train.engine.world import World
from emma_train.errors import UserError
from emma_train.storage.files import make_folder
from emma_train.storage.paths import StoragePath, as_local, storage_of

log = logging.getLogger(__name__)
LOCAL = "local"
"""Section of the metadata of a local checkpoint: `start`, and `after`, the step of the newest shared checkpoint."""
START = "local-start"


def local_folder(root: str, run_name: str, checkpoints: StoragePath) -> Path:
    """The folder of this node for a run whose checkpoints are in `checkpoints`; {node} in `root` is the node's name."""
    local = as_local(checkpoints)
    location = str(checkpoints) if local is None else os.path.abspath(local)
    digest = hashlib.sha256(location.encode()).hexdigest()[:8]
    return Path(root.replace("{node}", this_node())) / f"{run_name.replace('/', '-')}-{digest}"


def read_start(checkpoints: StoragePath) -> str | None:
    """The start whose local checkpoints count; None where the run has made none."""
    if not storage_of(checkpoints).exists(checkpoints / START):
        return None
    return storage_of(checkpoints).read(checkpoints / START).decode().strip()


def intact_files(folder: StoragePath, meta: Mapping[str, Any]) -> list[str]:
    """The files of a checkpoint that a node has, with their right size."""
    names = []
    for name, entry in meta["files"].items():
        try:
            if (folder / name).stat().st_size == entry["bytes"]:
                names.append(name)
        except OSError:
            continue
    return names


def remove_local(folder: Path, keep: str = "") -> None:
    """Remove a node's local checkpoints of a run but the one of the name `keep`; first rank of a node only. Nothing is
    raised: what stays is removed after the next save."""
    for path in storage_of(folder).listdir(folder):
        if path.name.startswith("step-") and path.name != keep:
            try:
                storage_of(folder).remove(path)
            except OSError as error:
                log.warning("%s: cannot be removed (%s)", path, error.strerror)


def check_local_folder(folder: Path, world: World) -> None:
    """Make the folder of every node. Every rank calls it. Raises UserError, on all ranks, where a node cannot write, or
    where two nodes see the same folder."""
    nodes = Nodes(world.gather(this_node()))
    problem: str | None = None
    probe = folder / "node"
    if nodes.is_first(world.rank):
        try:
            make_folder(folder)
            probe.write_text(this_node())
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder}: cannot be written ({error.strerror})"
    world.gather(None)  # all have written before any reads
    if problem is None and nodes.is_first(world.rank) and (other := probe.read_text()) != this_node():
        problem = f"{folder}: nodes {this_node()} and {other} see the same folder; name one of each node ({{node}})"
    for of_rank in world.gather(problem):
        if of_rank is not None:
            raise UserError(f"train.local_folder: {of_rank}")
    if len(set(nodes.names)) == 1 and world.is_main:
        log.warning("all ranks are on one node: local checkpoints have no copy on another one")


def is_continued(meta: Mapping[str, Any], start: str, shared_steps: Collection[int]) -> bool:
    """Whether a local checkpoint is of the start `start`, and the shared checkpoint before it is among `shared_steps`:
    a person may have moved that away to go back."""
    local = meta.get(LOCAL, {})
    return local.get("start") == start and (local.get("after") is None or local["after"] in shared_steps)
