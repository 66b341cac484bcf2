"""Functions that ranks run in tests of failures; a rank imports them by name, so they are in no test module."""

import errno
import math
import os
from collections.abc import Generator, Iterable
from typing import Any

from data_pipelines.loader import loader
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.sample_builder import SampleBuilder
from emma_train.cli import main
from emma_train.engine.fsdp import FsdpEngine
from emma_train.storage.local_storage import LocalStorage

ERRORS = {
    "bug": TypeError("unforeseen"),
    "files": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "memory": MemoryError(),
}


def failing_command(argv: list[str], where: str, kind: str) -> int:
    """A command on whose last rank an error is raised: in the `worker` that reads, in the `trainer` that receives packs
    or in the `builder` of samples."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        if where == "worker":
            SampleReader.read = _raise(kind)  # type: ignore[method-assign]
        elif where == "builder":
            SampleBuilder.sample = _raise(kind)  # type: ignore[method-assign]
        else:
            receive = loader._unpack_results

            def failing(results: Iterable[Any]) -> Generator[loader.LoadedSlot]:
                for number, slot in enumerate(receive(results)):
                    if number == 4:
                        raise ERRORS[kind]
                    yield slot

            loader._unpack_results = failing
    return main(argv)


def _raise(kind: str) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise ERRORS[kind]

    return fail


def diverging_command(argv: list[str], after: int) -> int:
    """A command whose gradient is not finite from step `after` + 1 on."""
    step, num_steps = FsdpEngine.step, 0

    def diverging(self: FsdpEngine, lr: float) -> float:
        nonlocal num_steps
        num_steps += 1
        return step(self, lr) if num_steps <= after else math.nan

    FsdpEngine.step = diverging  # type: ignore[method-assign]
    return main(argv)


def unreadable_command(argv: list[str], name: str, number: int) -> int:
    """A command whose last rank cannot read files whose path ends with `name`: the system answers `number`."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        for method in ("read", "open", "size"):
            setattr(LocalStorage, method, _failing_for(getattr(LocalStorage, method), name, number))
    return main(argv)


def _failing_for(method: Any, name: str, number: int) -> Any:
    def fail(self: LocalStorage, file: Any) -> Any:
        if str(file).endswith(name):
            raise OSError(number, os.strerror(number), str(file))
        return method(self, file)

    return fail
