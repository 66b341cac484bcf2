"""Run tests/gpu and write the outcome of each test as JSON and as Markdown.

python tests/gpu/run_tests.py [--out DIR] [PYTEST_ARGUMENT ...]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for workers


class Outcomes:
    """A plugin of pytest that keeps the outcome of every test and writes it at once, should the time run out."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            last_line = text.strip().splitlines()[-1:] or [""]
            values = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.tests.append({**values, "message": last_line[0], "text": text[-4000:]})
            self.write()

    def write(self) -> None:
        cuda = torch.cuda.is_available()
        facts = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        (self._out / "tests").with_suffix(".json").write_text(
            json.dumps({**facts, "tests": self.tests}, indent=1) + "\n"
        )
        lines = ["# Tests on a GPU", "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
        lines += ["| test | outcome | s | |", "|---|---|---|---|"]
        for test in self.tests:
            message = test["message"].replace("|", "/")[:200]
            lines.append(f"| {test['test']} | {test['outcome']} | {test['seconds']} | {message} |")
        (self._out / "tests").with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the results")
    arguments, for_pytest = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = [str(ROOT / "tests" / "gpu"), "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *for_pytest]
    return int(pytest.main(command, plugins=[Outcomes(arguments.out)]))


if __name__ == "__main__":
    sys.exit(main())
