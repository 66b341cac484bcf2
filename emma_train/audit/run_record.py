"""What a stage's run folder says about each of its steps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emma_train.checkpoint import folder as folders
from emma_train.config.load import load_stored_yaml
from emma_train.config.stored import complete
from emma_train.errors import UserError
from emma_train.monitor.run_state import DIGESTS_FILE, STARTS_FILE
from emma_train.monitor.trackers import read_jsonl
from emma_train.storage.paths import StoragePath
from emma_train.training.resume_rule import fixed_differences
from emma_train.training.step_digests import DATA, NOISE, PACKS, SKIPPED

DIGESTS = (DATA, PACKS, NOISE)
WITHOUT_EFFECT = ("timeout_s", "step_timeout_s", "debug_lockstep", "prefetch")
"""Keys of the section engine that change no bit of a result."""


@dataclass(frozen=True)
class Difference:
    """A value of one step that is not what it should be."""

    step: int
    quantity: str
    """A digest, a loss, weights, or steps."""
    text: str
    values: tuple[Any, Any] = (None, None)
    tensor: str | None = None


@dataclass
class RunRecord:
    """A stage's run folder."""

    folder: Path
    config: dict[str, Any]
    """As it was stored."""
    starts: list[dict[str, Any]]
    digests: dict[int, dict[str, str]]
    """Of every step, as it was computed last."""
    losses: dict[int, dict[str, float | None]]
    """Of every logged step; None where a loss was not finite."""
    checkpoints: dict[int, StoragePath]
    """Complete ones by step."""
    problems: list[Difference] = field(default_factory=list)
    """Steps that are missing, or that had other digests when they were computed again."""

    @property
    def world_sizes(self) -> set[int]:
        """Ranks of all starts."""
        return {int(start.get("world_size", 0)) for start in self.starts}

    @property
    def engine(self) -> dict[str, Any]:
        """Settings that may change how numbers are rounded."""
        config = complete(self.config, str(self.folder))
        engine = {k: v for k, v in config["engine"].items() if k not in WITHOUT_EFFECT}
        return {**engine, "attention": config["attention"]}


def read_run_record(folder: Path) -> RunRecord:
    """Raises UserError where the folder holds no run, or one without digests."""
    path = folder / DIGESTS_FILE
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run, for it has no config.yaml; name a run folder such as runs/NAME")
    if not path.is_file():
        raise UserError(f"{path}: does not exist; only runs of this version and newer have digests of every step")
    records = [record for record in read_jsonl(path) if isinstance(record.get("step"), int)]
    steps = folders.list_steps(folders.checkpoints_of_run(folder))
    checkpoints = {int(step.name.removeprefix("step-")): step for step in steps if folders.find_problem(step) is None}
    metrics, starts = folder / "metrics.jsonl", folder / STARTS_FILE
    record = RunRecord(
        folder=folder,
        config=load_stored_yaml(folder / "config.yaml"),
        starts=read_jsonl(starts) if starts.is_file() else [],
        digests={r["step"]: {name: r.get(name, "") for name in DIGESTS} for r in records},
        losses=dict(_losses(read_jsonl(metrics) if metrics.is_file() else [])),
        checkpoints=checkpoints,
    )
    record.problems = [*repeated_differently(str(folder), records), *missing_steps(record)]
    return record


def repeated_differently(name: str, records: list[dict[str, Any]]) -> list[Difference]:
    """The first step, for each digest, that had another one when it was computed again; `records` in order of time."""
    problems: dict[str, Difference] = {}
    before: dict[int, dict[str, Any]] = {}
    for record in records:
        step = record["step"]
        for digest in DIGESTS:
            values = (before.get(step, record).get(digest), record.get(digest))
            if (
                values[0] != values[1]
                and SKIPPED not in values
                and (digest not in problems or step < problems[digest].step)
            ):
                text = f"step {step} of {name}: {digest} was {values[0]}, and {values[1]} when it was computed again"
                problems[digest] = Difference(step, digest, text, values)
        before[step] = record
    return list(problems.values())


def missing_steps(record: RunRecord) -> list[Difference]:
    """The first step of the run that has no digests, if there is one."""
    last = max([0, *record.digests, *record.checkpoints])
    missing = [step for step in range(1, last + 1) if step not in record.digests]
    if not missing:
        return []
    more = f" ({len(missing)} of {last} steps have none)" if missing[1:] else ""
    return [Difference(missing[0], "steps", f"step {missing[0]} of {record.folder} has no digests{more}")]


def _losses(records: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, float | None]]]:
    """(step, losses by name); of a step that was logged twice, the later one comes last."""
    for record in records:
        if isinstance(record.get("step"), int) and "loss" in record:
            yield record["step"], {k: v for k, v in record.items() if k == "loss" or k.startswith("loss/")}


def differing_keys(one: RunRecord, other: RunRecord) -> Mapping[str, tuple[Any, Any]]:
    """Settings that decide what is learned from which data, and that differ: both values by key."""
    return fixed_differences(complete(one.config, str(one.folder)), other.config, str(other.folder))
