"""Jobs on a real SLURM of two nodes, which tests/slurm/up.sh starts on this host: root and slurm-wlm are needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import launchers

ROOT = Path(launchers.__file__).parents[1]
SCRIPTS = ROOT / "tests" / "slurm"
# Two packs a step, so that one and two ranks can share them; a line of metrics for each step.
SMALL = [
    "data.slots=2", "data.pack_tokens=1024", "data.samples_per_step=24", "train.sample_from=", "train.log_every=1",
    "train.save_every=1000", "init.any_stage=true", "init.from=null", "ema.decay=0",
]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("slurm")]


def what_is_missing() -> str:
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    lacking = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)" if lacking else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if missing := what_is_missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    started = subprocess.run([SCRIPTS / "up.sh", folder], capture_output=True, text=True, check=False)
    if started.returncode != 0:
        subprocess.run([SCRIPTS / "down.sh", folder], check=False)
        pytest.skip(f"no SLURM starts on this host: {started.stderr}")
    yield
    subprocess.run([SCRIPTS / "down.sh", folder], check=False)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


class Submitted:
    """A job of recipes/tiny/stage1.yaml on two nodes, one rank each."""

    def __init__(
        self,
        runs: Path,
        steps: int,
        *words: str,
        nnodes: int | str = 2,
        name: str = "run",
        clone: Path = ROOT,
        cwd: Path,
    ) -> None:
        options = ["--nproc", "1", "--gpus-per-node", "0", "--cpus-per-process", "1", "--time", "15:00"]
        recipe = str(clone / "recipes" / "tiny" / "stage1.yaml")
        line = [
            sys.executable,
            "-m",
            "emma_train",
            "launch",
            recipe,
            "--on",
            "slurm",
            "--nnodes",
            str(nnodes),
            *options,
        ]
        line += ["--grace-s", "60", *words, *SMALL, f"run.root={runs}", f"run.name={name}", f"train.steps={steps}"]
        environment = {**os.environ, "PYTHONPATH": str(clone), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        match = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert match, done.stdout + done.stderr
        self.id, self.run = match[1], runs / name

    @property
    def state(self) -> str:
        return subprocess.run(["scontrol", "show", "job", "-o", self.id], capture_output=True, text=True).stdout

    @property
    def output(self) -> str:
        path = self.run / "logs" / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    @property
    def rows(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, what: Callable[[], bool], timeout_s: float = 300) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < end, f"{self.state}\n{self.output}"
            time.sleep(0.2)

    def wait_until_it_trains(self, steps: int) -> None:
        self.wait_for(lambda: len(self.rows) >= steps)

    def wait_until(self, state: str) -> None:
        self.wait_for(lambda: f"JobState={state}" in self.state)

    def start_again_now(self) -> None:
        """A job that was put back waits some two minutes; its owner may say otherwise, once it is out of its nodes."""
        self.wait_for(lambda: "JobState=PENDING Reason=BeginTime" in self.state)
        # Within the second, its nodes still take it for the one that they were told to end, and the job fails.
        time.sleep(3)
        subprocess.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now"], check=True)


def test_a_job_stops_at_its_time_comes_back_and_ends_once(cluster: None, tmp_path: Path) -> None:
    """Launched from another folder; the stop is one line a node, and nothing starts after the last step."""
    job = Submitted(tmp_path / "runs", 25, cwd=tmp_path)
    job.wait_until_it_trains(3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.id], check=True)
    job.wait_for(lambda: "back into the queue" in job.output)
    job.start_again_now()
    job.wait_until("COMPLETED")
    assert {"Restarts=1", "ExitCode=0:0"} <= set(job.state.split())
    assert [row["step"] for row in job.rows] == list(range(1, 26))
    output = job.output
    assert "slurm: stopped before the end (exit code 75), back into the queue" in output
    assert "Traceback" not in output
    assert re.search(r"slurm: job \d+, start 2, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, commit ", output)
    # Both nodes have one address here, so that torch orders them by the numbers of their processes.
    assert re.search(r"2 ranks of type cpu on n\d \(rank 0\), n\d \(rank 1\), commit ", output)
    assert {path.name for path in (job.run / "logs").glob("*.log")} == {f"slurm-{job.id}-n{n}.log" for n in (1, 2)}


@pytest.mark.slurm
def test_requeued_by_hand_and_cancelled(cluster: None, tmp_path: Path) -> None:
    job = Submitted(tmp_path / "runs", 500, cwd=tmp_path)
    job.wait_until_it_trains(3)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.start_again_now()
    job.wait_for(lambda: "resumed" in job.output)
    subprocess.run(["scancel", job.id], check=True)
    job.wait_for(lambda: "JobState=CANCELLED" in job.state and "slurm: the job was cancelled" in job.output)
    assert "Restarts=1" in job.state
    assert list((job.run / "checkpoints").glob("step-*"))


@pytest.mark.slurm
def test_a_dead_process_is_restarted_and_a_crash_loop_ends_after_three(cluster: None, tmp_path: Path) -> None:
    """The copied code of a job that still waits is changed, so that every start ends at step 5."""
    job = Submitted(tmp_path / "runs", 12, "--max-restarts", "9", "--sbatch=--hold", cwd=tmp_path)
    (loop,) = job.run.glob("launches/*/code/emma_train/training/loop.py")
    marker = "            log_now = data.step"
    assert marker in loop.read_text()
    loop.write_text(
        loop.read_text().replace(marker, f"            if data.step == 5: import os; os._exit(9)\n{marker}")
    )
    subprocess.run(["scontrol", "release", job.id], check=True)
    job.wait_until("FAILED")
    output = job.output
    assert "slurm: failed (exit code 1); restart 1 of 9" in output
    assert "slurm: 3 starts in a row made no new step (at step 4)" in output
    assert output.count("building the model") == 4  # the first made steps 1 to 4
    assert "ExitCode=1:0" in job.state


@pytest.mark.slurm
def test_a_mistake_of_the_user_ends_the_job_at_once_with_exit_code_2(cluster: None, tmp_path: Path) -> None:
    job = Submitted(tmp_path / "runs", 12, "--sbatch=--hold", cwd=tmp_path)
    (recipe,) = job.run.glob("launches/*/recipe/base.yaml")
    recipe.write_text(recipe.read_text() + "nonsense: 1\n")
    subprocess.run(["scontrol", "release", job.id], check=True)
    job.wait_until("FAILED")
    assert "ExitCode=2:0" in job.state
    assert "unknown key nonsense" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slurm
def test_an_edit_of_code_or_recipe_does_not_reach_a_job_that_comes_back(cluster: None, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in ("emma_train", "data_pipelines", "launchers", "recipes"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    job = Submitted(tmp_path / "runs", 25, clone=clone, cwd=clone)
    job.wait_until_it_trains(3)
    (clone / "emma_train" / "__main__.py").write_text("raise SystemExit('edited code is running')\n")
    (clone / "recipes" / "tiny" / "stage1.yaml").write_text("nonsense: 1\n")
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.start_again_now()
    job.wait_until("COMPLETED")
    assert "edited code" not in job.output
    assert job.rows[-1]["step"] == 25


@pytest.mark.slurm
def test_a_job_goes_on_without_a_node_that_is_lost(cluster: None, tmp_path: Path) -> None:
    job = Submitted(tmp_path / "runs", 30, nnodes="1:2", cwd=tmp_path)
    job.wait_until_it_trains(3)
    node = "NodeName=n2"
    subprocess.run(["scontrol", "update", node, "State=DOWN", "Reason=test"], check=True)
    try:
        job.wait_until("COMPLETED")
    finally:
        subprocess.run(["scontrol", "update", node, "State=RESUME"], check=False)  # it may be back by itself
    assert "ExitCode=0:0" in job.state and "Restarts=0" in job.state
    assert re.search(r"launch: training on 2 nodes \((n1, n2|n2, n1)\)", job.output)
    assert "launch: training on 1 node (n1), 2 before" in job.output
    assert [row["step"] for row in job.rows][-1] == 30


@pytest.mark.slurm
def test_two_nodes_one_and_two_again_see_the_same_data(cluster: None, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for steps, nnodes in ((6, 2), (12, 1), (18, 2)):
        job = Submitted(runs, steps, nnodes=nnodes, cwd=tmp_path)
        job.wait_until("COMPLETED")
    straight = Submitted(runs, 18, nnodes=1, name="straight", cwd=tmp_path)
    straight.wait_until("COMPLETED")
    digests = [[row["data/digest"] for row in run.rows] for run in (job, straight)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 18
    for ours, theirs in zip(job.rows, straight.rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
