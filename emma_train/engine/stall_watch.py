"""What hangs, when a step takes too long: every rank says where it is, and one of them writes it down.

timeouts.py and heartbeat.py end a run that hangs. This says why, shortly before: stacks of all ranks and of their
loader workers, and the samples that are read, in logs/hang-after-STEP-DATE.txt of the run folder, and one line on the
console. It works beside training, so also where a rank waits for its GPU in a call that never returns (issue 17).
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from emma_train.engine.rank_failure import list_ranks, store_key
from emma_train.engine.torch_private import default_store
from emma_train.engine.world import World
from emma_train.stacks import CONSOLE, all_stacks, describe_process, group_ranks

log = logging.getLogger(__name__)
POLL_S = 2.0
ANSWER_S = 12.0
"""So long the ranks have to say where they are; one that does not is stopped, dead or cut off."""
EARLY_SHARE, EARLY_S = 0.2, 60.0
"""How long before the end of the time for a step the ranks are asked: this share of it, and at most so many seconds."""
NO_ANSWER = "does not answer: stopped, dead or cut off"
MAX_SHOWN = 8
"""Parts of the line on the console; the file has all."""
Describe = Callable[[], Sequence[str]]


class StallWatch:
    """A context. The trainer says with `expect` how long what it does now may take.

    describe: further lines about this rank, as of its loader workers; it is called in another thread while training
    hangs, and must not wait for it.
    """

    _num_made = 0

    def __init__(
        self, world: World, logs: Path, describe: Describe = tuple, poll_s: float = POLL_S, answer_s: float = ANSWER_S
    ) -> None:
        self._rank, self._size = world.rank, world.size
        self._logs, self._describe = logs, describe
        self._poll_s, self._answer_s = poll_s, answer_s
        StallWatch._num_made += 1
        self._number = 0
        self._deadline: float | None = None
        self._since = time.monotonic()
        self.done = 0
        """The last step that has ended, for the report."""
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)

    def expect(self, seconds: float) -> None:
        """The next call of this method comes within `seconds`; if it does not, all ranks are asked where they are."""
        self._since = time.monotonic()
        self._deadline = self._since + seconds - min(EARLY_SHARE * seconds, EARLY_S)

    def rest(self) -> None:
        """Nothing is expected from here on."""
        self._deadline = None

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(timeout=1)  # longer only where the store hangs

    def _run(self) -> None:
        store = default_store().clone() if self._size > 1 else None  # type: ignore[attr-defined]
        try:
            while not self._left.wait(self._poll_s):
                is_late = self._deadline is not None and time.monotonic() > self._deadline
                if is_late or (store is not None and store.check([self._key("asked")])):
                    self._answer(store)
        except dist.DistError:
            pass  # the store is gone, which heartbeat.py reports

    def _answer(self, store: dist.Store | None) -> None:
        """Say where this rank is; the first to answer waits for the others and writes the report."""
        self._deadline = None
        waited = time.monotonic() - self._since
        answer = [describe_process(), *self._describe(), all_stacks()]
        if store is None:
            self._report({0: answer}, waited)
            return
        store.set(self._key("asked"), "")
        store.set(self._key(f"rank/{self._rank}"), json.dumps(answer))
        is_reporter = store.add(self._key("reporters"), 1) == 1
        if is_reporter:
            self._report(self._gather(store), waited)
        self._number += 1

    def _gather(self, store: dist.Store) -> dict[int, list[str]]:
        """The answers by rank, of those that give one in time."""
        deadline = time.monotonic() + self._answer_s
        answers: dict[int, list[str]] = {}
        while len(answers) < self._size and time.monotonic() < deadline:
            for rank in range(self._size):
                key = self._key(f"rank/{rank}")
                if rank not in answers and store.check([key]):
                    answers[rank] = json.loads(store.get(key))
            time.sleep(0.1)
        return answers

    def _report(self, answers: dict[int, list[str]], waited: float) -> None:
        lines = {rank: answers[rank][0] if rank in answers else NO_ANSWER for rank in range(self._size)}
        summary = [f"{list_ranks(ranks)}: {line}" for line, ranks in group_ranks(lines)]
        title = f"no progress after step {self.done} for {waited:.0f} s"
        parts = [title, *summary, ""]
        for rank, (_, *rest) in sorted(answers.items()):
            parts += [f"rank {rank} of {self._size}", *rest, ""]
            summary += [f"rank {rank} {line.removeprefix(CONSOLE)}" for line in rest if line.startswith(CONSOLE)]
        path = self._logs / f"hang-after-{self.done}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(parts), encoding="utf-8")
        except OSError as error:  # a disk that hangs or is full may be what is wrong
            log.warning("%s: cannot be written (%s)", path, error)
        log.error("%s: %s (%s)", title, "; ".join(summary[:MAX_SHOWN]), path)

    def _key(self, name: str) -> str:
        return store_key(f"stall/{StallWatch._num_made}/{self._number}/{name}")
