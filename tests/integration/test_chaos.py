"""The short form of tests/chaos: a run with four faults equals an undisturbed one."""

import json
from pathlib import Path

import pytest

from tests.chaos.__main__ import chaos, start_fork_server
from tests.chaos.trainer import SHORT_WAITS_VARIABLE
from tests.distributed.spawn import ROOT

KINDS = ("rank killed", "everything killed", "flipped bit of a read", "flipped bit of a gradient")


@pytest.mark.slow
def test_a_run_with_four_faults_equals_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_fork_server()  # before the copy of the code becomes the current folder: other tests fork from it too
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(SHORT_WAITS_VARIABLE, "1")
    out = tmp_path / "chaos"
    out.mkdir()
    assert chaos(out, minutes=3, num_faults=len(KINDS), seed=0, only=list(KINDS)) == 0, (out / "table.txt").read_text()
    events = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert sorted(event["kind"] for event in events) == sorted(KINDS)
    assert json.loads((out / "result.json").read_text())["problems"] == []
