"""A stage on a card: killed and started again, it has the bits of one that was not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = "cuda"
SETTINGS = "train.steps=8 train.save_every=4 train.log_every=1 train.sample_every=0 validate.every=0 init.from=null"


def start(root: Path, name: str, compiled: bool) -> subprocess.Popen[str]:
    values = [f"run.root={root}", f"run.name={name}", f"engine.device={DEVICE}", f"engine.compile={compiled}".lower()]
    command = [sys.executable, "-m", "emma_train", "train", "recipes/tiny/stage1.yaml", *values, *SETTINGS.split()]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_killed_stage_resumes_to_the_same_bits(tmp_path: Path, compiled: bool) -> None:
    for package in ("pyarrow", "webdataset", "diffusers"):
        pytest.importorskip(package)
    end(start(tmp_path, "straight", compiled))
    killed, log = start(tmp_path, "killed", compiled), tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (log.exists() and '"step": 6' in log.read_text()):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    end(start(tmp_path, "killed", compiled))
    command = [sys.executable, "-m", "emma_train", "audit", str(tmp_path / "straight"), str(tmp_path / "killed")]
    audit = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "8 steps with equal digests; 8 logged losses equal in all bits" in audit.stdout
