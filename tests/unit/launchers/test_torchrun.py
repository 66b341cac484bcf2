"""The agent of a node: exit code of the trainer, and a line where torchrun prints thirty."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.exit_codes import node_exit_code, read_exit_codes
from launchers.torchrun import slurm_rendezvous

ROOT = Path(__file__).parents[3]

TRAINER = """
import os, signal, sys, time
from pathlib import Path
from emma_train.__main__ import leave_exit_code
ends = sys.argv[1].split(",")
end = ends[int(os.environ["LOCAL_RANK"])]
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "stops":
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    print("waiting", flush=True)
    while not asked:
        time.sleep(0.05)
    end = "75"
if end == "waits":
    time.sleep(60)
leave_exit_code(int(end))
sys.exit(int(end))
"""


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ({0: 0, 1: 0}, False, 0),
        ({0: 0, 1: 0}, True, 0),
        ({0: 75, 1: 75}, True, 75),
        ({0: 2, 1: 1}, False, 2),
        ({0: 1, 1: 75}, True, 1),
        ({0: 75}, False, 1),  # the other was killed
        ({0: 75}, True, 75),  # the other was killed because it did not stop in time
        ({}, False, 1),
        ({0: 0, 1: 75}, True, 75),
    ],
)
def test_the_exit_code_of_a_node(codes: dict[int, int], stopped: bool, expected: int) -> None:
    assert node_exit_code(codes, 2, stopped) == expected


def test_the_nodes_of_an_srun_agree_on_a_rendezvous() -> None:
    task = {"SLURM_JOB_ID": "24007", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "2"}
    first, second = (slurm_rendezvous({**task, "SLURM_NODEID": node}, "10.0.0.1") for node in "01")
    assert first[:-1] == second[:-1]
    assert (first[-1], second[-1]) == ("is_host=1", "is_host=0")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:20007 --rdzv-id 24007.3" in " ".join(first)


def test_slurm_outside_of_an_srun_is_one_line() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    line = [sys.executable, "-m", "launchers.torchrun", "--slurm", "-m", "emma_train", "doctor"]
    done = subprocess.run(line, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "srun --ntasks-per-node=1" in done.stderr


def test_only_the_newest_start_counts(tmp_path: Path) -> None:
    assert read_exit_codes(tmp_path) == {}
    for name, code in {"0-0": "1", "0-1": "1", "1-0": "0"}.items():
        (tmp_path / name).write_text(code)
    assert read_exit_codes(tmp_path) == {0: 0}


def start(tmp_path: Path, ends: str) -> subprocess.Popen:
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    words = ["--log", str(tmp_path / "log"), "--standalone", "--nproc-per-node", str(len(ends.split(",")))]
    line = [sys.executable, "-m", "launchers.torchrun", *words, str(program), ends]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ("0,0", 0, ""),
        ("2,2", 2, ""),
        ("1,0", 1, ""),
        ("killed,waits", 1, "launch: local rank 0: killed by SIGKILL"),
    ],
)
def test_a_node_ends_as_its_processes_do(tmp_path: Path, ends: str, code: int, words: str) -> None:
    process = start(tmp_path, ends)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code
    assert words in output
    assert "Traceback" not in output
    assert (tmp_path / "log").read_text() == output


@pytest.mark.seconds
def test_a_stop_is_one_line_and_exit_75(tmp_path: Path) -> None:
    process = start(tmp_path, "stops,stops")
    log = tmp_path / "log"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("waiting") == 2):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75
    assert "launch: SIGTERM: all processes of this node have ended" in output
    assert "Traceback" not in output
    assert log.read_text() == output
