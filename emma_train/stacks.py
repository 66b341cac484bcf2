"""Where the threads of a process are, in words and as stacks: what one needs to know of a process that hangs."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType

COLLECTIVE_OF_FUNCTION = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_object": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "foreach_all_gather": "all-gather",
    "foreach_all_gather_copy_out": "all-gather",
    "wait_for_unshard": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "foreach_reduce": "reduce-scatter",
    "finalize_backward": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast",
    "gather": "gather",
    "gather_object": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}
"""Functions of torch.distributed, FSDP2 among it, in which a rank waits for others."""
CONSOLE = "! "
"""Lines of a report that begin with this are shown on the console too."""
_COLLECTIVE_FILES = os.path.join("torch", "distributed", "")
_LOADER_FILE = os.path.join("torch", "utils", "data", "dataloader.py")
_PACKAGES = ("emma_train", "data_pipelines")
_READ_AHEAD = "_read_ahead"


def describe_thread(frame: FrameType) -> str:
    """One line: what a thread waits for, and the innermost line of our code that it is in.

    Its module is named where FSDP2 knows it. `frame`: the thread's innermost frame, as sys._current_frames gives it.
    """
    collective = module = where = ""
    waits_for_pack = False
    for current, line in traceback.walk_stack(frame):
        file, function = current.f_code.co_filename, current.f_code.co_name
        if _COLLECTIVE_FILES in file:
            collective = collective or COLLECTIVE_OF_FUNCTION.get(function, "")
            module = module or str(getattr(current.f_locals.get("self"), "_module_fqn", None) or "")
        waits_for_pack = waits_for_pack or file.endswith(_LOADER_FILE) or function == _READ_AHEAD
        if not where and (package := _package(file)):
            where = f"{package}:{line} in {function}"
    if collective:
        return f"waits in {collective}{f' of {module}' if module else ''}, {where}"
    if waits_for_pack:
        return "waits for a pack of its loader"
    return f"is at {where}" if where else "runs no code of ours"


def describe_process() -> str:
    """The line of the thread that waits in a collective, else of the main thread: on a GPU, autograd runs backward in
    other threads than the main one."""
    frames = sys._current_frames()
    main = threading.main_thread().ident or 0
    lines = {ident: describe_thread(frame) for ident, frame in frames.items()}
    waiting = [line for ident, line in lines.items() if ident != main and line.startswith("waits in")]
    if main in lines and not lines[main].startswith("waits") and waiting:
        return waiting[0]
    return lines.get(main, "runs no code of ours")


def all_stacks() -> str:
    """The stacks of all threads but the calling one, the innermost line last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: names.get(item[0], "") != "MainThread"):
        if ident != threading.get_ident():
            stack = "".join(traceback.format_stack(frame))
            parts.append(f"thread {names.get(ident, 'of the autograd engine or of C++')}:\n{stack}")
    return "\n".join(parts)


def group_ranks(lines: Mapping[int, str]) -> Iterator[tuple[str, list[int]]]:
    """Lines and the ranks of which each is true; the fewest ranks first, as those are the ones to look at."""
    ranks: dict[str, list[int]] = {}
    for rank, line in sorted(lines.items()):
        ranks.setdefault(line, []).append(rank)
    yield from sorted(ranks.items(), key=lambda item: (len(item[1]), item[1]))


def _package(file: str) -> str:
    """The path from our package on; empty for other code."""
    parts = file.split(os.sep)
    for name in _PACKAGES:
        if name in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(name) :])
    return ""
