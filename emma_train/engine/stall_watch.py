"""What hangs, when a step takes too long: every rank says where it is, and one of them writes it down.

timeouts.py and heartbeat.py end a run that hangs. This says why, shortly before: stacks of all ranks and of their
loader workers, and the samples that are read, in logs/hang-after-STEP-DATE.txt of the run folder, and one line on the
console. It works beside training, so also where a rank waits for its GPU in a call that never returns (issue 17).
Where the store that the ranks share hangs, as that of a rank 0 that is stopped, each rank reports what it knows itself.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from emma_train.engine.rank_failure import can_reach_store, list_ranks, store_key
from emma_train.engine.torch_private import default_store
from emma_train.engine.world import World
from emma_train.stacks import CONSOLE, all_stacks, describe_process, group_ranks

log = logging.getLogger(__name__)
POLL_S = 2.0
ANSWER_S = 12.0
"""So long the ranks have to say where they are; one that does not is stopped, dead or cut off."""
STORE_SILENT_S = 5.0
"""A store that has not answered for so long hangs: its calls take milliseconds."""
EARLY_SHARE, EARLY_S = 0.2, 60.0
"""How long before the end of the time for a step the ranks are asked: this share of it, and at most so many seconds."""
NO_ANSWER = "does not answer: stopped, dead or cut off"
NO_STORE = f"{NO_ANSWER}, and so does not the store that it keeps"
CUT_OFF = "cannot reach the machine of rank 0, which keeps the store"
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
        self._late_at: float | None = None
        self._since = self._heard = time.monotonic()
        """When something was expected last; when the store has answered last."""
        self._is_asked = self._has_answered = False
        self.done = 0
        """The last step that has ended, for the report."""
        self._left = threading.Event()
        functions = (self._run, self._watch_store) if self._size > 1 else (self._run,)
        self._threads = [threading.Thread(target=function, name="stall-watch", daemon=True) for function in functions]

    def expect(self, seconds: float) -> None:
        """The next call of this method comes within `seconds`; if it does not, all ranks are asked where they are."""
        self._since = time.monotonic()
        self._late_at = self._since + seconds - min(EARLY_SHARE * seconds, EARLY_S)
        self._is_asked = self._has_answered = False

    def rest(self) -> None:
        """Nothing is expected from here on."""
        self._late_at = None

    def own_hang(self) -> str:
        """Where this rank is if it has kept the others waiting for too long; empty where it waits for them itself."""
        line = describe_process()
        return line if self._is_late() and not line.startswith("waits in") else ""

    def __enter__(self) -> "StallWatch":
        self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(timeout=1)  # longer only where the store hangs

    def _is_late(self) -> bool:
        return self._late_at is not None and time.monotonic() > self._late_at

    def _run(self) -> None:
        store = default_store().clone() if self._size > 1 else None  # type: ignore[attr-defined]
        try:
            while not self._left.wait(self._pause_s()):
                is_late = self._is_late() and not self._is_asked
                if is_late or (store is not None and store.check([self._key("asked")])):
                    self._answer(store)
                self._heard = time.monotonic()
        except dist.DistError:
            pass  # the store is gone, which heartbeat.py reports

    def _pause_s(self) -> float:
        """Seconds to the next look at the store: none is asked for more often, but what is late is noticed at once."""
        if self._late_at is None or self._is_asked:
            return self._poll_s
        return min(self._poll_s, max(self._late_at - time.monotonic(), 0.05))

    def _watch_store(self) -> None:
        """Report what this rank knows where the store hangs, in which the other thread waits."""
        while not self._left.wait(self._poll_s / 2):
            is_silent = time.monotonic() - self._heard > STORE_SILENT_S
            if is_silent and self._is_late() and not self._has_answered:
                self._has_answered = True
                waited, answer = time.monotonic() - self._since, self._own_answer()
                if not can_reach_store():
                    lines = {self._rank: f"{CUT_OFF}; {answer[0]}"}
                else:
                    lines = {self._rank: answer[0], **({} if self._rank == 0 else {0: NO_STORE})}
                self._report(lines, {self._rank: answer}, waited, f"-rank-{self._rank}")

    def _own_answer(self) -> list[str]:
        return [describe_process(), *self._describe(), all_stacks()]

    def _answer(self, store: dist.Store | None) -> None:
        """Say where this rank is; the first to answer waits for the others and writes the report."""
        self._is_asked = True
        waited = time.monotonic() - self._since
        answer = self._own_answer()
        if store is None:
            self._report({0: answer[0]}, {0: answer}, waited)
            return
        store.set(self._key("asked"), "")
        store.set(self._key(f"rank/{self._rank}"), json.dumps(answer))
        is_reporter = store.add(self._key("reporters"), 1) == 1
        self._has_answered = True
        if is_reporter:
            answers = self._gather(store)
            lines = {rank: answers[rank][0] if rank in answers else NO_ANSWER for rank in range(self._size)}
            self._report(lines, answers, waited)
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

    def _report(
        self, lines: Mapping[int, str], answers: Mapping[int, Sequence[str]], waited: float, suffix: str = ""
    ) -> None:
        """Write the file and the line on the console. `lines`: where ranks are; `suffix`: of the name of the file."""
        summary = [f"{list_ranks(ranks)}: {line}" for line, ranks in group_ranks(lines)]
        title = f"no progress after step {self.done} for {waited:.0f} s"
        parts = [title, *summary, ""]
        for rank, (_, *rest) in sorted(answers.items()):
            parts += [f"rank {rank} of {self._size}", *rest, ""]
            summary += [f"rank {rank} {line.removeprefix(CONSOLE)}" for line in rest if line.startswith(CONSOLE)]
        path = self._logs / f"hang-after-{self.done}-{time.strftime('%Y%m%d-%H%M%S')}{suffix}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(parts), encoding="utf-8")
        except OSError as error:  # a disk that hangs or is full may be what is wrong
            log.warning("%s: cannot be written (%s)", path, error)
        log.error("%s: %s (%s)", title, "; ".join(summary[:MAX_SHOWN]), path)

    def _key(self, name: str) -> str:
        return store_key(f"stall/{StallWatch._num_made}/{self._number}/{name}")
