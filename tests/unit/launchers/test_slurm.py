"""The SLURM script: its text, its syntax, and, where a SLURM answers, a job that is stopped and comes back."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emma_train.errors import UserError
from launchers import slurm
from launchers.command import LaunchOptions
from launchers.slurm import launch, slurm_script

RECIPE = "recipes/tiny/stage1.yaml"

# Stands in for the trainer: counts to 40, and stops with 75 and its count written down when it hears TERM.
STUB = r"""
import os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
rank = os.environ["RANK"]
count = pathlib.Path(f"count{rank}")
first = int(count.read_text()) if count.exists() else 0
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\n").encode())  # whole lines, or ranks would mix theirs
say("start", rank, "of", os.environ["WORLD_SIZE"], "at", first, sys.argv[1:])
for step in range(first, 40):
    time.sleep(0.25)
    count.write_text(str(step + 1))
    if stop:
        sys.exit(75)
say("done", rank)
"""


def render(options: LaunchOptions, overrides: tuple[str, ...] = ()) -> str:
    return slurm_script(
        RECIPE,
        overrides,
        options,
        logs=Path("/runs/a/logs"),
        workdir=Path("/home/me/emma"),
        bin_path=Path("/home/me/emma/.venv/bin"),
    )


def test_script_has_every_directive() -> None:
    script = render(
        LaunchOptions(on="slurm", nnodes=4, time="08:00:00", partition="gpu", account="us", sbatch=["--exclusive"])
    )
    assert re.findall("^#SBATCH (.*)", script, re.MULTILINE) == [
        "--job-name=emma",
        "--chdir=/home/me/emma",
        "--output=/runs/a/logs/slurm-%j.out",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--gpus-per-node=8",
        "--time=08:00:00",
        "--partition=gpu",
        "--account=us",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@300",
    ]
    assert "{{" not in script


def test_script_runs_the_documented_command() -> None:
    script = render(LaunchOptions(nnodes=2, nproc=3, gpus_per_node=0), ("train.steps=20", "run.name=it's"))
    assert (
        'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=300 bash -c '
        "'exec torchrun --nproc-per-node 3 --shutdown-timeout 300 --nnodes 2 --rdzv-backend c10d "
        "--rdzv-endpoint $EMMA_RENDEZVOUS --rdzv-id $SLURM_JOB_ID --rdzv-conf is_host=$((SLURM_NODEID == 0)) "
        '"$@"\' torchrun \\\n'
        "    -m emma_train train recipes/tiny/stage1.yaml train.steps=20 'run.name=it'\"'\"'s' &"
    ) in script
    assert "gpus-per-node" not in script
    assert "--standalone" in render(LaunchOptions())


@pytest.mark.parametrize("nnodes", [1, 2])
def test_script_is_bash(nnodes: int, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(render(LaunchOptions(nnodes=nnodes), ("resume.allow=[a, b]", "run.name=it's $HOME")))
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    "bad",
    [
        LaunchOptions(nnodes=0),
        LaunchOptions(nproc=0),
        LaunchOptions(gpus_per_node=-1),
        LaunchOptions(cpus_per_process=10**18),
        LaunchOptions(time="word"),
        LaunchOptions(sbatch=["exclusive"]),
        LaunchOptions(qos="a\nb"),
    ],
)
def test_impossible_options_are_refused(bad: LaunchOptions) -> None:
    with pytest.raises(UserError, match="launch: "):
        render(bad)


def test_a_script_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--script {tmp_path}: cannot be written"):
        launch(RECIPE, [], LaunchOptions(on="slurm", script=str(tmp_path)), tmp_path / "logs")


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    assert launch(RECIPE, ["a.b=c"], LaunchOptions(on="slurm", dry_run=True), logs) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert launch(RECIPE, ["a.b=c"], LaunchOptions(nproc=2, dry_run=True), logs) == 0
    printed = capsys.readouterr().out
    assert printed == f"torchrun --standalone --nproc-per-node 2 -m emma_train train {RECIPE} a.b=c\n"
    assert not logs.exists()


def test_without_sbatch_the_script_is_there_to_take_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    script = tmp_path / "logs" / "slurm.sbatch"
    with pytest.raises(UserError, match=f"sbatch is not on this machine; submit {script}"):
        launch(RECIPE, [], LaunchOptions(on="slurm"), tmp_path / "logs")
    assert script.read_text().startswith("#!/bin/bash\n")
    assert capsys.readouterr().out == f"sbatch {script}\n"


def slurm_is_missing() -> str:
    if shutil.which("sbatch") is None:
        return "SLURM is not installed"
    answered = subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode == 0
    return "" if answered else "no SLURM answers here"


@pytest.fixture
def submitted(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A job of the stub on two nodes, two processes each, by its id; its output is in tmp_path/logs."""
    if missing := slurm_is_missing():
        pytest.skip(missing)
    (tmp_path / "emma_train").mkdir()
    (tmp_path / "emma_train" / "__main__.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    options = LaunchOptions(
        on="slurm", nnodes=2, nproc=2, cpus_per_process=1, gpus_per_node=0, time="00:05:00", grace_s=20
    )
    assert launch("stub.yaml", ["a.b=c"], options, tmp_path / "logs") == 0
    match = re.search(r"Submitted batch job (\d+)", capfd.readouterr().out)
    assert match
    return match[1]


@pytest.mark.slow
def test_a_stopped_job_comes_back_and_finishes(submitted: str, tmp_path: Path) -> None:
    output = tmp_path / "logs" / f"slurm-{submitted}.out"
    wait_for(lambda: read(output).count("start") == 4)
    assert "start 3 of 4 at 0 ['train', 'stub.yaml', 'a.b=c']" in read(output)
    subprocess.run(["scancel", "--batch", "--signal=USR1", submitted], check=True)
    wait_for(lambda: "back into the queue" in read(output))
    start_now(submitted)
    wait_for(lambda: "JobState=COMPLETED" in job(submitted))
    assert "Restarts=1" in job(submitted)
    assert read(output).count("done") == 4
    starts = [int(first) for first in re.findall(r"of 4 at (\d+)", read(output))]
    assert starts[:4] == [0] * 4
    assert min(starts[4:]) > 0


@pytest.mark.slow
def test_a_cancelled_job_stays_down(submitted: str, tmp_path: Path) -> None:
    output = tmp_path / "logs" / f"slurm-{submitted}.out"
    wait_for(lambda: read(output).count("start") == 4)
    subprocess.run(["scancel", submitted], check=True)
    wait_for(lambda: "COMPLETING" not in job(submitted) and "RUNNING" not in job(submitted))
    time.sleep(2)
    assert "JobState=CANCELLED" in job(submitted)
    assert "back into the queue" not in read(output)


def start_now(job_id: str) -> None:
    """A job that was put back waits some two minutes; its owner may say otherwise, once it is out of its nodes."""
    wait_for(lambda: "JobState=PENDING Reason=BeginTime" in job(job_id))
    # Within the second, its nodes still take it for the one that they were told to end, and the job fails.
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], check=True)


def job(job_id: str) -> str:
    return subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True, check=True).stdout


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
