"""Say whether two runs saw the same data and noise, and learned the same, step by step."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from emma_train.audit.audit import LOSS_MARGIN, WEIGHT_MARGIN

    parser.add_argument("run_folder", metavar="RUN", help="run folder of a stage or a pipeline")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="the run to compare with; none audits RUN alone")
    exact = "0 where world sizes and engine are the same"
    parser.add_argument(
        "--loss-margin", type=_margin, metavar="X", help=f"share of the loss that may differ ({LOSS_MARGIN:g}; {exact})"
    )
    parser.add_argument(
        "--weight-margin", type=_margin, metavar="X", help=f"how far weights may differ ({WEIGHT_MARGIN:g}; {exact})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print a line for each stage. Returns 1 if the runs differ; raises UserError where they cannot be compared."""
    from emma_train.errors import UserError

    try:
        differ, values, lines = _audit(arguments)
    except UserError as error:
        if not arguments.json:
            raise
        print(json.dumps({"outcome": "not comparable", "reason": str(error)}))
        return 2
    outcome = "different" if differ else "equal"
    print(json.dumps({"outcome": outcome, **values}) if arguments.json else "\n".join([*lines, outcome]))
    return DIFFERENT if differ else 0


def _audit(arguments: argparse.Namespace) -> tuple[bool, dict[str, Any], list[str]]:
    """Whether something differs; the audit as values for JSON, and as lines."""
    from dataclasses import asdict

    from emma_train.audit.audit import Margins, audit_run, audit_runs

    one = Path(arguments.run_folder)
    if arguments.other is None:
        records = audit_run(one)
        problems = {name: [asdict(problem) for problem in record.problems] for name, record in records.items()}
        lines = [
            f"{name}: {record.problems[0].text if record.problems else f'{len(record.digests)} steps, none missing'}"
            for name, record in records.items()
        ]
        return any(problems.values()), {"stages": [{"name": n, "differences": p} for n, p in problems.items()]}, lines
    stages = audit_runs(one, Path(arguments.other), Margins(arguments.loss_margin, arguments.weight_margin))
    values = {"stages": [_strict(stage.as_json()) for stage in stages]}
    return any(stage.differences for stage in stages), values, [stage.line() for stage in stages]


def _strict(values: Any) -> Any:
    """The same with numbers that are not finite as text, which JSON has no other way to write."""
    if isinstance(values, dict):
        return {key: _strict(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_strict(value) for value in values]
    return str(values) if isinstance(values, float) and not math.isfinite(values) else values


def _margin(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value
