"""The rendezvous of an elastic job: torch's c10d rendezvous, with rules for what torch does not decide.

Before each round a node checks itself. A round trains on the largest number of its nodes that can share the packs of a
step; the others wait as spares, outside of the trainer's world. A node that arrives is taken in where that number
grows and a step has been made since the start. Three starts in a row without a new step end the job.
"""

import os
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError, Store
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    _RendezvousState,
    create_handler,
)

from launchers.command import SAVE_S
from launchers.exit_codes import FAILED, node_exit_code, read_exit_codes
from launchers.node_check import check_node, node_name
from launchers.repeated_step import repeated_step
from launchers.restarts import Starts, next_start, steps_done

BACKEND = "emma-elastic"
"""The name of this rendezvous in torch's registry."""
UNLIMITED = 1_000_000
LOOK_S = 1.0
"""Seconds between two looks at the other nodes."""
CHECK_AGAIN_S = 60.0
STOP_S = 30
"""Seconds that processes have to end after a failure."""
GATHER_S = 60.0
"""Seconds for which nodes that are ready for a round wait for those that are not."""
LEFT, READY = "emma/left", "emma/ready/"
"""In the store of a round: a node that trained in it has left; followed by a rank: it is ready for the next one."""
ARRIVED, EXIT_CODE, NUM_ENDED = "emma/arrived", "emma/end", "emma/ended"
"""In the store of the job: how many nodes have been ready for a first round; exit code of a job that failed; how many
nodes know that."""


class JobEnd(Exception):
    """The job ends at this node, with an exit code and a line that says why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class ElasticJob:
    """What a node knows of its job."""

    node_counts: tuple[int, ...]
    """Numbers of nodes that can share the packs of a step, in ascending order."""
    run: Path
    """The run folder, which shows the steps that are done."""
    num_processes: int
    """Processes of a node."""
    num_devices: int
    """GPUs that a node must have; 0 where it trains on CPUs."""
    exit_codes: Path
    """A folder where each process of this node writes its exit code."""
    max_restarts: int = UNLIMITED


def nodes_that_train(num_nodes: int, node_counts: Sequence[int]) -> int:
    """The largest number of so many nodes that can share the packs of a step; 0 where none can."""
    return max((count for count in node_counts if count <= num_nodes), default=0)


def num_gone(live_ranks: Set[int], num_training: int, has_left: bool) -> int:
    """How many of the nodes that train, ranks 0 to num_training - 1, are lost or left; a lost spare changes nothing."""
    return max(len(set(range(num_training)) - live_ranks), int(has_left))


class ElasticRendezvous(RendezvousHandler):
    """torch's rendezvous of `job`'s nodes, under the rules above."""

    def __init__(self, rounds: DynamicRendezvousHandler, store: Store, job: ElasticJob) -> None:
        self._rounds, self._store, self._job = rounds, store, job
        self._joined: RendezvousInfo | None = None
        """The round before, with its spares."""
        self._round: RendezvousInfo | None = None
        """The same without spares; None where this node was one."""
        self._names: list[str] = []
        """Names of the nodes that train, or did in the round before."""
        self._starts, self._steps_before = Starts(), 0
        self._looked, self._num_changes = 0.0, 0
        self.stop_timeout_s = STOP_S

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this node trains in a round. Raises JobEnd."""
        try:
            self._leave()
            while True:
                self._wait_until_well()
                self._gather()
                self._joined = joined = self._join()
                num_training = nodes_that_train(joined.world_size, self._job.node_counts)
                if joined.rank < num_training:
                    return self._begin(joined, num_training)
                self._wait_as_spare(joined, num_training)
        except RendezvousClosedError:
            code = FAILED if self._round is not None else 0
            if self._store.check([EXIT_CODE]):
                code = int(self._store.get(EXIT_CODE))
            raise JobEnd(code, f"{node_name()}: the job has ended") from None

    def num_nodes_waiting(self) -> int:
        """More than 0 where the processes of this node have to end, because another round begins."""
        assert self._round is not None
        return self._count_changes(self._round, len(self._names))

    def _leave(self) -> None:
        """End what is left of the round before. Raises JobEnd where no other may follow."""
        if self._round is None:
            return
        self._round.store.set(LEFT, "")
        code = node_exit_code(read_exit_codes(self._job.exit_codes), self._job.num_processes, stopped=False)
        decision, reason, self._starts = next_start(
            self._starts,
            code=code or FAILED,
            stopped=False,
            running=True,
            steps=steps_done(self._job.run),
            max_restarts=self._job.max_restarts,
        )
        if decision == "end":
            self._store.set(EXIT_CODE, str(code or FAILED))
            if self._store.add(NUM_ENDED, 1) > 1:  # another node says why
                raise RendezvousClosedError
            raise JobEnd(code or FAILED, f"{reason}{repeated_step(self._job.run) if self._starts.idle else ''}")
        for path in self._job.exit_codes.iterdir():
            path.unlink()

    def _wait_until_well(self) -> None:
        """Return when the check of this node has nothing to say against it."""
        said: list[str] = []
        while problems := check_node(self._job.run, self._job.num_devices):
            self._rounds._stop_heartbeats()  # the others wait for this node no longer
            self._joined = None
            if problems != said:
                _say(f"{node_name()} is left out: {'; '.join(problems)}; checked again every {CHECK_AGAIN_S:g} s")
            said = problems
            time.sleep(CHECK_AGAIN_S)
            if self._rounds.is_closed():
                raise RendezvousClosedError

    def _gather(self) -> None:
        """Wait for the nodes that can be expected in the next round: all at the start of a job, later those of the
        round before that live. torch itself would only wait for a fixed time after the fewest."""
        joined, number, end = self._joined, self._state().round, time.monotonic() + GATHER_S
        if joined is None:
            self._store.add(ARRIVED, 1)
        else:
            joined.store.set(f"{READY}{joined.rank}", "")
        while time.monotonic() < end:
            state = self._state()
            if joined is None:
                is_full = self._store.add(ARRIVED, 0) >= self._rounds.settings.max_nodes
                done = is_full or state.complete
            else:
                others = set(state.participants.values()) - {joined.rank}
                done = state.round != number or all(joined.store.check([f"{READY}{other}"]) for other in others)
            if done or state.closed:
                return
            time.sleep(LOOK_S / 4)

    def _state(self) -> _RendezvousState:
        """What all nodes know of the rendezvous, not older than a second."""
        self._rounds.num_nodes_waiting()
        return self._rounds._state_holder.state

    def _join(self) -> RendezvousInfo:
        """Wait for the next round, for as long as there is one in which others train."""
        while True:
            try:
                return self._rounds.next_rendezvous()
            except RendezvousTimeoutError:
                if not self._state().complete:
                    raise

    def _begin(self, joined: RendezvousInfo, num_training: int) -> RendezvousInfo:
        """The round as the agent sees it, without spares."""
        addresses = joined.bootstrap_store_info
        assert addresses is not None
        joined.store.set(f"emma/name/{joined.rank}", node_name())
        names = [joined.store.get(f"emma/name/{rank}").decode() for rank in range(num_training)]
        if joined.rank == 0:
            before = f", {len(self._names)} before" if self._names else ""
            _say(f"training on {num_training} node{'s' * (num_training > 1)} ({', '.join(names)}){before}")
        self._names, self._steps_before = names, steps_done(self._job.run)
        self._looked, self._num_changes, self.stop_timeout_s = 0.0, 0, STOP_S
        self._round = RendezvousInfo(joined.store, joined.rank, num_training, addresses)
        return self._round

    def _wait_as_spare(self, joined: RendezvousInfo, num_training: int) -> None:
        """Return when another round begins. Raises JobEnd where the rendezvous cannot be reached any more."""
        _say(f"{node_name()} waits as a spare: {num_training} of {joined.world_size} nodes can share a step")
        self._round, self._steps_before = None, steps_done(self._job.run)
        try:
            while not self._count_changes(joined, num_training):
                if self._rounds.is_closed():
                    raise RendezvousClosedError
                time.sleep(LOOK_S)
        except RendezvousClosedError:
            raise
        except (RendezvousError, DistError):
            raise JobEnd(0, f"{node_name()}: the job has ended, or its rendezvous is gone") from None

    def _count_changes(self, current: RendezvousInfo, num_training: int) -> int:
        """How many nodes left, are lost or are to be taken in; looks every LOOK_S."""
        if self._num_changes or time.monotonic() - self._looked < LOOK_S:
            return self._num_changes
        self._num_changes = self._look(current, num_training)
        self._looked = time.monotonic()
        return self._num_changes

    def _look(self, current: RendezvousInfo, num_training: int) -> int:
        state = self._state()
        ranks, waiting = set(state.participants.values()), len(state.wait_list)
        if gone := num_gone(ranks, num_training, current.store.check([LEFT])):
            return gone
        grows = nodes_that_train(len(ranks) + waiting, self._job.node_counts) > num_training
        if waiting and grows and steps_done(self._job.run) > self._steps_before:
            self.stop_timeout_s = SAVE_S
            return waiting
        return 0

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return self._rounds.use_agent_store

    def is_closed(self) -> bool:
        return self._rounds.is_closed()

    def set_closed(self) -> None:
        self._rounds.set_closed()

    def get_run_id(self) -> str:
        return self._rounds.get_run_id()

    def shutdown(self) -> bool:
        return self._rounds.shutdown()


class _Agent(LocalElasticAgent):
    """torch's agent, which gives processes 30 s to end, however long a checkpoint takes."""

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=worker_group.spec.rdzv_handler.stop_timeout_s)  # type: ignore[attr-defined]


def use_elastic(job: ElasticJob) -> str:
    """Let torch's agents of this process meet by these rules. Returns the name of the rendezvous."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher import api

    def create(parameters: RendezvousParameters) -> ElasticRendezvous:
        backend, store = create_backend(parameters)
        return ElasticRendezvous(create_handler(store, backend, parameters), store, job)

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # rank 0 may move to another node
    rendezvous_handler_registry.register(BACKEND, create)
    api.LocalElasticAgent = _Agent  # type: ignore[misc]
    return BACKEND


def _say(line: str) -> None:
    sys.stderr.write(f"launch: {line}\n")
    sys.stderr.flush()
