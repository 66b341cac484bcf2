"""Whether a run with faults is the same as an undisturbed one, and what the faults cost."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from emma_train.audit.audit import Margins, audit_runs
from emma_train.monitor.goodput import CAUSES, Ledger
from tests.chaos.driver import Event
from tests.runs import metrics

COUNTS = ("step", "seen/samples", "seen/tokens", "data/digest", "packs/digest", "noise/digest", "data/replaced")


def audit_lines(run: Path, reference: Path) -> tuple[list[str], bool]:
    """The lines of `emma-train audit`, and whether the runs are equal."""
    audits = audit_runs(run, reference, Margins())
    return [audit.line() for audit in audits], not any(audit.differences for audit in audits)


def step_problems(run: Path, reference: Path) -> list[str]:
    """Steps that metrics.jsonl lacks or has twice, or with other counts than the reference."""
    rows, others = metrics(run), {row["step"]: row for row in metrics(reference)}
    steps = [row["step"] for row in rows]
    problems = []
    if steps != list(range(1, len(steps) + 1)):
        problems.append(f"the steps of metrics.jsonl are not 1 to {len(steps)}")
    for row in rows:
        other = others.get(row["step"], {})
        problems += [f"step {row['step']}: {key}" for key in COUNTS if row.get(key) != other.get(key)]
    return problems


def ledger_table(ledger: Ledger) -> list[str]:
    """A table of the ledger, in markdown."""
    lines = ["| cause | seconds | share |", "|---|---|---|"]
    for cause, name in CAUSES.items():
        if seconds := ledger.seconds[cause]:
            lines.append(f"| {name} | {seconds:.0f} | {100 * seconds / ledger.wall_s:.1f} % |")
    return [*lines, f"| all | {ledger.wall_s:.0f} | |"]


def fault_table(events: Sequence[Event], skipped: Iterable[tuple[str, str]]) -> list[str]:
    """A table of kinds, in markdown."""
    lines = [
        "| kind | faults | starts after it | right rank named | after s | s lost, mean (all) | problems |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({event.kind for event in events}, key=[event.kind for event in events].index)
    for kind in kinds:
        some = [event for event in events if event.kind == kind]
        lost = [event.lost_s for event in some]
        watched = [event for event in some if event.named_s is not None]
        named = f"{len(watched)} of {len(some)}" if watched else ""
        after = f"{max(event.named_s or 0 for event in watched):.0f}" if watched else ""
        problems = sum(bool(event.problems) for event in some)
        starts = sum(event.starts for event in some)
        cost = f"{sum(lost) / len(lost):.1f} ({sum(lost):.0f})"
        lines.append(f"| {kind} | {len(some)} | {starts} | {named} | {after} | {cost} | {problems or ''} |")
    lines += [f"| {kind} | 0: {reason} | | | | | |" for kind, reason in skipped]
    total = sum(event.lost_s for event in events)
    return [*lines, f"| all ({len(kinds)} kinds) | {len(events)} | | | | {total:.0f} | |"]
