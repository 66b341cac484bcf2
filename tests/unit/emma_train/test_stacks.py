"""A thread's place in words."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emma_train.stacks import all_stacks, describe_process, describe_thread, group_ranks


@contextmanager
def waiting_in(function: Callable[[threading.Event], None]) -> Iterator[threading.Thread]:
    """A thread that waits in `function` for the event that it is given."""
    done = threading.Event()
    thread = threading.Thread(target=function, args=(done,), name="other")
    thread.start()
    try:
        while not _is_in_wait(thread):
            pass
        yield thread
    finally:
        done.set()
        thread.join()


def _is_in_wait(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "wait"


def line_of(function: Callable[[threading.Event], None]) -> str:
    with waiting_in(function) as thread:
        return describe_thread(sys._current_frames()[thread.ident or 0])


def compiled(file: str, text: str) -> Callable[[threading.Event], None]:
    """A function whose code claims to be of `file`."""
    names: dict[str, Callable[[threading.Event], None]] = {}
    exec(compile(text, file, "exec"), names)
    return names["run"]


TORCH = "/venv/lib/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py"
GROUP = """
class Group:
    _module_fqn = "decoder.layers.7"

    def wait_for_unshard(self, done):
        done.wait()

def run(done):
    Group().wait_for_unshard(done)
"""


def test_a_collective_and_its_module_are_named() -> None:
    assert line_of(compiled(TORCH, GROUP)).startswith("waits in all-gather of decoder.layers.7, ")


def test_our_innermost_line_is_named() -> None:
    text = "def inner(done):\n    done.wait()\n\ndef run(done):\n    inner(done)\n"
    assert line_of(compiled("/code/emma_train/engine/fsdp.py", text)) == "is at emma_train/engine/fsdp.py:2 in inner"


def test_a_wait_for_the_loader_is_named() -> None:
    text = "def run(done):\n    done.wait()\n"
    assert line_of(compiled("/venv/torch/utils/data/dataloader.py", text)) == "waits for a pack of its loader"


def test_a_backward_thread_that_waits_speaks_for_its_process() -> None:
    with waiting_in(compiled(TORCH, GROUP)):
        assert describe_process().startswith("waits in all-gather of decoder.layers.7")
        assert "thread other:" in all_stacks()
        assert "wait_for_unshard" in all_stacks()
    assert not describe_process().startswith("waits in")


def test_the_fewest_ranks_come_first() -> None:
    lines = {0: "waits", 1: "waits", 2: "reads", 3: "waits", 4: "is at x"}
    assert list(group_ranks(lines)) == [("reads", [2]), ("is at x", [4]), ("waits", [0, 1, 3])]
