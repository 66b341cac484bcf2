"""The short form of tests/chaos: a run with four faults equals an undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.spawn import ROOT

KINDS = ("rank killed", "everything killed", "flipped bit of a read", "flipped bit of a gradient")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_four_faults_equals_one_without(tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    words = ["--minutes", "3", "--faults", str(len(KINDS)), "--out", str(out)]
    words += [word for kind in KINDS for word in ("--only", kind)]
    done = subprocess.run([sys.executable, "-m", "tests.chaos", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert sorted(event["kind"] for event in events) == sorted(KINDS)
    assert json.loads((out / "result.json").read_text())["problems"] == []
