"""The metrics of one logged step (docs/metrics.md has the list)."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from emma_train.config.schema import Recipe
from emma_train.engine.compiled import num_graphs
from emma_train.engine.grad_norm import GRAD_SQUARE
from emma_train.engine.world import World
from emma_train.flops.work import step_mfu
from emma_train.metrics import Recorded
from emma_train.monitor.usage import memory_gib
from emma_train.objectives.loss import Counts, losses
from emma_train.sequence.step_batches import StepBatches
from emma_train.sequence.tasks import TASKS
from emma_train.stages.stage import Stage
from emma_train.training.health import SpikeWatch
from emma_train.training.metric_reduction import reduce_metrics
from emma_train.training.source_losses import pop_source_losses
from emma_train.training.step_totals import StepTotals
from emma_train.training.train_state import TrainState

log = logging.getLogger(__name__)
LOSS_SUM = "loss_sum/"
"""Recorded under this prefix and a task: the sum of its losses, from which `losses` computes what is logged."""


class StepMetrics:
    """Builds the line of every logged step of a stage. Every rank has one and calls it at the same steps."""

    def __init__(self, recipe: Recipe, stage: Stage, world: World) -> None:
        self._recipe = recipe
        self._stage = stage
        self._world = world
        self._spikes = SpikeWatch()
        self._num_first_graphs: int | None = None

    def after_step(self) -> None:
        """Call it after every step: graphs that torch.compile makes after the first one are counted."""
        if self._num_first_graphs is None:
            self._num_first_graphs = num_graphs()

    def line(
        self,
        data: StepBatches,
        totals: StepTotals,
        state: TrainState,
        recorded: Recorded,
        lr: float,
        grad_norm: float,
        started: float,
        waited_s: float = 0.0,
    ) -> dict[str, Any]:
        """Metrics of a step that began at `started` (time.perf_counter), by name; waits for the device. `waited_s`:
        seconds of it in which this rank waited for others to begin.

        Raises ValueError where a recorded metric has the name of one that is logged here.
        """

        def usage() -> RankUsage:
            step_s = time.perf_counter() - started + data.wait_s
            return RankUsage(step_s - waited_s, memory_gib(self._world.device))

        reduced, ranks = reduce_metrics(recorded, self._world, usage)
        step_s = time.perf_counter() - started + data.wait_s
        loss_sums = [reduced.pop(f"{LOSS_SUM}{task}") for task in TASKS]
        loss_values = losses(loss_sums, Counts(totals.loss_tokens), self._recipe.loss)
        spike = self._spikes.note(loss_values["loss"])
        if spike:
            log.warning("step %d: %s", data.step, spike)
        values: dict[str, Any] = {
            "step": data.step,
            "stage": self._recipe.stage.name,
            **loss_values,
            **pop_source_losses(reduced),
            "lr": lr,
            "grad_norm": grad_norm,
            **pop_group_norms(reduced),
            **{f"samples/{task}": number for task, number in totals.samples.items()},
            "tokens/total": totals.tokens,
            "seen/samples": sum(state.seen.values()),
            "seen/tokens": state.tokens,
            "tokens/padding": 0,  # packs have no padding; tools that compare trainers expect the key
            "tokens_per_s": totals.tokens / step_s,
            **data_metrics(data, state),
            "steps/skipped": state.skipped_steps,
            **({"health/spike": 1} if spike else {}),
            **self._usage(data, step_s, ranks[self._world.rank].memory_gib),
            **(rank_metrics(ranks) if len(ranks) > 1 else {}),
        }
        if taken := values.keys() & reduced.keys():
            raise ValueError(f"record_metric: {', '.join(sorted(taken))} is logged by the loop; use another name")
        return {**values, **reduced}

    def _usage(self, data: StepBatches, step_s: float, peak_gib: float) -> dict[str, float]:
        """What the step used on this rank."""
        usage = {"memory_gib": peak_gib, "step_s": step_s}
        if self._recipe.engine.compile:
            usage["compile/recompiles"] = num_graphs() - (self._num_first_graphs or 0)
        share = step_mfu(
            self._recipe.model,
            self._stage.trainable,
            data.packs,
            step_s,
            self._world.device,
            self._world.sp_size,
            encoder_only=self._stage.loss == "router",
        )
        return usage if share is None else {**usage, "mfu": share}


class RankUsage(NamedTuple):
    """What a logged step used on one rank."""

    step_s: float
    """Seconds, without those in which it waited for other ranks to begin."""
    memory_gib: float
    """Peak memory since the last logged step."""


def rank_metrics(ranks: Sequence[RankUsage]) -> dict[str, float]:
    """Which rank is the slowest, by what each has used."""
    times = [usage.step_s for usage in ranks]
    slowest = max(range(len(ranks)), key=times.__getitem__)
    return {
        "ranks/step_s_mean": sum(times) / len(times),
        "ranks/step_s_max": times[slowest],
        "ranks/slowest": slowest,
        "ranks/slowest_memory_gib": ranks[slowest].memory_gib,
    }


def pop_group_norms(reduced: dict[str, float]) -> dict[str, float]:
    """`grad_norm/GROUP` of the parameter groups, from what was recorded over all ranks, which is removed."""
    names = [name.removeprefix(GRAD_SQUARE) for name in reduced if name.startswith(GRAD_SQUARE)]
    return {f"grad_norm/{name}": math.sqrt(reduced.pop(f"{GRAD_SQUARE}{name}")) for name in names}


def data_metrics(data: StepBatches, state: TrainState) -> dict[str, Any]:
    """What the step says of its data; samples that are not those of the plan are counted over the run."""
    return {
        "data/wait_s": data.wait_s,
        "data/digest": data.digest,
        "data/straggler": data.straggler,
        "data/skipped": state.dropped_samples,
        "data/replaced": state.replaced_samples,
        "data/refused": state.too_long_samples,
        "data/unsuitable": state.unsuitable_samples,
        "data/fill": data.filled,
        "data/epoch": data.epoch,
    }
