"""The SLURM script: its text and its syntax. tests/integration/test_slurm.py runs it."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from emma_train.errors import UserError
from launchers import Job, LaunchOptions, first_of_array, launch, slurm
from launchers.slurm import slurm_script, submit
from launchers.snapshot import Snapshot

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny" / "stage0.yaml"
JOB = Job(run=Path("/runs/a"), workdir=Path("/home/me/emma"), workers=3)
SNAPSHOT = Snapshot(Path("/runs/a/launches/1"), Path("/runs/a/launches/1/recipe/stage1.yaml"), "0123456789ab")


def render(*overrides: str, job: Job = JOB, **options: Any) -> str:
    given = LaunchOptions(**{"on": "slurm", **options})
    return slurm_script(overrides, given, job, SNAPSHOT, bin_path=Path("/home/me/emma/.venv/bin"))


def directives(script: str) -> list[str]:
    return re.findall("^#SBATCH (.*)", script, re.MULTILINE)


def test_script_has_every_directive() -> None:
    script = render(
        nnodes=4,
        time="08:00:00",
        partition="gpu",
        account="us",
        mem="0",
        exclusive=True,
        exclude="n[7,9]",
        dependency="afterok:12",
        mail_user="me@example.org",
        mail_type="FAIL",
        sbatch=["--constraint=h100"],
    )
    assert directives(script) == [
        "--job-name=a",
        "--chdir=/home/me/emma",
        "--output=/runs/a/logs/slurm-%j.out",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",  # 8 processes with 3 loader workers each
        "--gpus-per-node=8",
        "--time=08:00:00",
        "--partition=gpu",
        "--account=us",
        "--mem=0",
        "--exclude='n[7,9]'",
        "--dependency=afterok:12",
        "--mail-user=me@example.org",
        "--mail-type=FAIL",
        "--exclusive",
        "--constraint=h100",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@300",
    ]
    assert "{{" not in script


def test_script_runs_the_copied_code_on_the_copied_recipe() -> None:
    script = render("train.steps=20", "run.name=it's", nnodes=2, nproc=3, gpus_per_node=0)
    assert "export PYTHONSAFEPATH=1 PYTHONPATH=/runs/a/launches/1/code${PYTHONPATH:+:$PYTHONPATH}\n" in script
    (srun,) = re.findall(r"^    srun .*\n.*", script, re.MULTILINE)
    words = shlex.split(srun.replace("\\\n", ""))
    assert words[:4] == ["srun", "--cpus-per-task=$SLURM_CPUS_PER_TASK", "--kill-on-bad-exit=0", "--wait=300"]
    assert words[4:6] == ["bash", "-c"]
    assert words[6] == (
        "exec python -m launchers.torchrun --nproc-per-node 3 --shutdown-timeout 300 --nnodes 2 --rdzv-backend c10d "
        "--rdzv-endpoint $EMMA_RENDEZVOUS --rdzv-id $SLURM_JOB_ID.$SLURM_STEP_ID "
        "--rdzv-conf is_host=$((SLURM_NODEID == 0)) "
        '--log /runs/a/logs/"slurm-$SLURM_JOB_ID-$SLURMD_NODENAME.log" "$@"'
    )
    assert words[7:] == [
        "torchrun", "-m", "emma_train", "train", "/runs/a/launches/1/recipe/stage1.yaml", "train.steps=20",
        "run.name=it's", "&",
    ]  # fmt: skip
    assert "gpus-per-node" not in script
    assert "--standalone" in render()
    assert "\nmax_restarts=3\n" in script
    assert "\nmax_restarts=0\n" in render(max_restarts=0)


def test_an_elastic_job_outlives_its_nodes() -> None:
    job = Job(Path("/runs/a"), Path("/home/me/emma"), 3, node_counts=(2, 4))
    script = render(job=job, nnodes=5, min_nodes=2, nproc=8)
    assert {"--nodes=5", "--no-kill"} <= set(directives(script))
    assert ' --wait=0 --no-kill --nodes="$nodes" --ntasks="$nodes" bash -c ' in script
    assert " --node-counts 2,4 --run /runs/a --num-devices 8 --nnodes 2:$SLURM_STEP_NUM_NODES " in script
    assert "processes, rendezvous" in script and " up to 40 processes" in script
    assert "--no-kill" not in render(nnodes=5)


def test_environment_of_a_cluster() -> None:
    script = render(module=["cuda/12.8", "a b"], env=["NCCL_DEBUG=INFO", "X=a 'b'"], setup=["ulimit -l unlimited"])
    lines = script.splitlines()
    start = lines.index("module load cuda/12.8")
    assert lines[start : start + 6] == [
        "module load cuda/12.8",
        "module load 'a b'",
        "export PATH=/home/me/emma/.venv/bin:$PATH",
        "export NCCL_DEBUG=INFO",
        "export X='a '\"'\"'b'\"'\"''",
        "ulimit -l unlimited",
    ]


def test_a_container_has_an_environment_of_its_own() -> None:
    script = render(container_image="/images/emma.sqsh", container_mounts="/data:/data", srun=["--mpi=pmix"])
    assert "--wait=300 --container-image=/images/emma.sqsh --container-mounts=/data:/data --mpi=pmix bash -c" in script
    assert "export PATH=" not in script


def test_an_array_gives_each_run_its_number() -> None:
    job = Job(Path("/runs/seed-{array}"), Path("/home/me"), 0)
    script = render("run.name=seed-{array}", "data.seed={array}", job=job, array="0-2")
    assert {"--array=0-2", "--output=/runs/seed-array/logs/slurm-%A_%a.out"} <= set(directives(script))
    environment = {"SLURM_ARRAY_TASK_ID": "2"}

    def expanded(words: str) -> str:
        return subprocess.run(["bash", "-c", f"echo {words}"], env=environment, capture_output=True, text=True).stdout

    (train,) = re.findall(r"torchrun (-m emma_train .*) &", script)
    assert expanded(train).strip().endswith("stage1.yaml run.name=seed-2 data.seed=2")
    (run,) = re.findall(r"--run (\S+) ", script)
    assert expanded(run) == "/runs/seed-2\n"
    assert first_of_array(LaunchOptions(array="4,5"), ["data.seed={array}"]) == ["data.seed=4"]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"array": "0-2"}, r"each needs a name of its own: run\.name=NAME-\{array\}"),
        (["data.seed={array}"], {}, "needs --array"),
        ([], {"sbatch": ["exclusive"]}, "no sbatch directive"),
        ([], {"qos": "a\nb"}, "no sbatch directive"),
    ],
)
def test_impossible_options_are_refused(overrides: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"launch: .*{message}"):
        render(*overrides, **options)


@pytest.mark.parametrize("nnodes", [1, 2])
def test_script_is_bash(nnodes: int, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(render("resume.allow=[a, b]", "run.name=it's $HOME", nnodes=nnodes, env=["A=$(rm x)"]))
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path / "run", tmp_path, 0)
    assert launch(RECIPE, [RECIPE], ["a.b=c"], LaunchOptions(on="slurm", dry_run=True), job) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert launch(RECIPE, [RECIPE], ["a.b=c"], LaunchOptions(nproc=2, dry_run=True), job) == 0
    assert f" --standalone --nproc-per-node 2 -m emma_train train {RECIPE} a.b=c\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_the_same_run_is_named_before_another_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, tools = tmp_path / "runs" / "a", tmp_path / "bin"
    tools.mkdir()
    jobs = f"7 (RUNNING) {run}/launches/1/job.sbatch\n8 (PENDING) {run}b/launches/1/job.sbatch\n9 (PENDING) (null)\n"
    for name, text in (("squeue", jobs), ("sbatch", "Submitted batch job 10\n")):
        (tools / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert submit("#!/bin/bash\n", tmp_path / "job.sbatch", run / "logs") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("launch:")] == [
        "launch: this run has a job already: 7 (RUNNING); if both run at once, the later one fails"
    ]


def test_without_sbatch_the_script_is_there_to_take_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"sbatch is not on this machine; submit .*job\.sbatch"):
        launch(RECIPE, [RECIPE], ["a.b=c"], LaunchOptions(on="slurm"), Job(tmp_path, tmp_path, 0))
    (folder,) = (tmp_path / "launches").iterdir()
    assert (folder / "job.sbatch").read_text().startswith("#!/bin/bash\n")
    assert capsys.readouterr().out == f"sbatch {folder / 'job.sbatch'}\n"
    assert json.loads((folder / "launch.json").read_text())["command"] == ["emma-train", "train", str(RECIPE), "a.b=c"]


def test_a_job_that_could_never_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would never train"):
        launch(RECIPE, [RECIPE], [], LaunchOptions(on="slurm", time="4:00"), Job(tmp_path, tmp_path, 0))
    assert list(tmp_path.iterdir()) == []
