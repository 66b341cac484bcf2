"""The benchmark of optimizer steps runs on a CPU too, so that it works when a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT


def test_the_step_benchmark_measures_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "tests/gpu/step.py", "--device", "cpu", "--tiny", "--only", "eager", "compile-flex"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    eager, flex = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert eager["step_s"] > 0 and eager["tokens_per_s"] > 0 and eager["flops"] > 0
    assert eager["last_loss"] < eager["first_loss"]
    assert "Self CPU" in (tmp_path / "profile-eager.txt").read_text()
    # A setting that cannot run here is an entry with its error and stops no other.
    assert "needs an NVIDIA GPU" in flex["error"] and "error-compile-flex.txt" in {p.name for p in tmp_path.iterdir()}
    assert "| eager | 4 |" in (tmp_path / "step").with_suffix(".md").read_text()
