"""Names of the sources of a task, for metrics."""

from collections.abc import Iterable

from data_pipelines.planner.sources import TaskStream
from emma_train.storage.urls import display_url


def source_names(stream: TaskStream) -> dict[str, str]:
    """By folder, the name of each source that the stream reads; empty where it reads only one."""
    folders = dict.fromkeys(part.source.path for pool in stream.pools for part in pool.kept)
    return short_names(folders) if len(folders) > 1 else {}


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """The ends of paths or URLs that are as short as they can be and differ: of data/a/train and data/b/train, a/train
    and b/train."""
    parts = {folder: [part for part in display_url(folder).split("/") if part] for folder in folders}
    longest = max((len(of_folder) for of_folder in parts.values()), default=0)
    names: dict[str, str] = {}
    for length in range(1, longest + 1):
        names = {folder: "/".join(of_folder[-length:]) for folder, of_folder in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names
