"""The certificate that two runs are the same over any chain of world sizes, engines and restarts (docs/reliability.md).

It reads run folders alone, stage by stage.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emma_train.audit.compare import Largest, differing_digests, differing_losses, differing_weights
from emma_train.audit.run_record import Difference, RunRecord, differing_keys, read_run_record
from emma_train.errors import UserError
from emma_train.report.stage_run import stage_folders

LOSS_MARGIN, WEIGHT_MARGIN = 1e-5, 1e-4
"""Largest differences that rounding may cause in fp32: of losses as a share of the loss, of weights absolute."""


@dataclass(frozen=True)
class Margins:
    """None takes 0 where world sizes and engine are the same, and else LOSS_MARGIN and WEIGHT_MARGIN."""

    loss: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class StageAudit:
    """What the audit of one stage says."""

    name: str
    steps: int
    """Steps 1 to this one were compared."""
    exact: bool
    """Whether world sizes and engine are the same, so that all bits must be."""
    differences: list[Difference]
    """The first one of each kind, in order of steps."""
    losses: Largest
    weights: Largest

    def line(self) -> str:
        """One line for people."""
        if self.differences:
            return f"{self.name}: {self.differences[0].text}"
        parts = [f"{self.steps} steps with equal digests"]
        for numbers, what in ((self.losses, "logged losses"), (self.weights, "common checkpoints")):
            by = f"up to {numbers.difference:.2g} apart (step {numbers.step}, {numbers.name})"
            parts.append(f"{numbers.compared} {what} {by if numbers.difference else 'equal in all bits'}")
        return f"{self.name}: {'; '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def audit_runs(one: Path, other: Path, margins: Margins) -> list[StageAudit]:
    """The audit of every stage that both runs have. Raises UserError where they cannot be compared."""
    ours, theirs = _stages(one), _stages(other)
    if len(ours) == len(theirs) == 1:
        pairs = [(*ours.values(), *theirs.values())]
    else:
        pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
    if not pairs:
        raise UserError(f"{one} has the stages {', '.join(ours)} and {other} has {', '.join(theirs)}: none in common")
    return [audit_stage(read_run_record(first), read_run_record(second), margins) for first, second in pairs]


def audit_stage(one: RunRecord, other: RunRecord, margins: Margins) -> StageAudit:
    """Compare two runs of a stage. Raises UserError where their recipes differ in what decides the data, the noise or
    the learning, or no step is in both."""
    if keys := differing_keys(one, other):
        lines = [f"{key} ({ours!r} and {theirs!r})" for key, (ours, theirs) in keys.items()]
        raise UserError(
            f"{one.folder} and {other.folder} have other recipes, and so cannot be equal: {', '.join(lines)}"
        )
    if not one.digests.keys() & other.digests.keys():
        raise UserError(f"{one.folder} and {other.folder} have no step in common")
    steps = range(1, min(max(one.digests), max(other.digests)) + 1)
    exact = len(one.world_sizes | other.world_sizes) == 1 and one.engine == other.engine
    loss_margin = margins.loss if margins.loss is not None else 0.0 if exact else LOSS_MARGIN
    weight_margin = margins.weight if margins.weight is not None else 0.0 if exact else WEIGHT_MARGIN
    loss_differences, losses = differing_losses(one, other, loss_margin)
    weight_differences, weights = differing_weights(one, other, weight_margin, with_optimizer=weight_margin == 0)
    differences = [
        *one.problems,
        *other.problems,
        *differing_digests(one, other, steps),
        *loss_differences,
        *weight_differences,
    ]
    return StageAudit(one.folder.name, len(steps), exact, sorted(differences, key=lambda d: d.step), losses, weights)


def audit_run(run: Path) -> dict[str, RunRecord]:
    """The record of every stage, in which no step may be missing and each that was computed again must be the same."""
    return {name: read_run_record(folder) for name, folder in _stages(run).items()}


def _stages(run: Path) -> dict[str, Path]:
    """The run folders of the stages by name. Raises UserError where there is none."""
    stages = stage_folders(run) if run.is_dir() else []
    if not stages:
        raise UserError(f"{run} holds no run; name the folder of a run or a pipeline such as runs/NAME")
    return {stage.name: stage for stage in stages}
