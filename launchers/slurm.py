"""A run as a SLURM job: the filled-in template slurm.sbatch, written to a file and submitted."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from emma_train.errors import UserError
from launchers.command import ELASTIC_CONF, Elastic, bin_directory, elastic_words, shell_line, train_arguments
from launchers.options import LaunchOptions
from launchers.snapshot import Snapshot

ARRAY = "{array}"
"""In an override: the number of a run of an array."""
"""In an override: the number of each run of a job array."""
MAX_RESTARTS = 3


@dataclass(frozen=True)
class Job:
    """What a job runs, and where."""

    run: Path
    """Its run folder, an absolute path; {array} stands in the name for the number of each of several runs."""
    workdir: Path
    """The folder to which relative paths of the recipe belong."""
    workers: int
    """Loader workers of a process."""
    node_counts: Sequence[int] = ()
    """Of an elastic job: numbers of nodes that can share the packs of a step, in ascending order."""

    @property
    def logs(self) -> Path:
        """Of all runs of an array in one folder, because SLURM opens them before the runs have folders."""
        return Path(str(self.run).replace(ARRAY, "array")) / "logs"

    def elastic(self, options: LaunchOptions) -> Elastic | None:
        """What an elastic job is beside its options; None for a fixed number of nodes."""
        return Elastic(self.node_counts, options.nnodes, self.run) if options.min_nodes is not None else None


def slurm_script(
    overrides: Sequence[str], options: LaunchOptions, job: Job, snapshot: Snapshot, bin_path: Path | None = None
) -> str:
    """The complete batch script. bin_path: folder of this environment's commands. Raises UserError."""
    num_processes = options.nproc if options.nproc is not None else options.gpus_per_node or 1
    _check_array(options, overrides)
    bin_path = bin_path or bin_directory()
    train = train_arguments(str(snapshot.recipe), overrides)
    elastic = job.elastic(options)
    log = f'{shlex.quote(str(job.logs))}/"slurm-$SLURM_JOB_ID-$SLURMD_NODENAME.log"'
    node = f'{_node_command(options, num_processes, elastic)} --log {log} "$@"'
    node = f"exec {node}" if elastic is None else f"trap : TERM; {node}{_LEAVE_CODE}"
    return _fill(
        files("launchers").joinpath("slurm.sbatch").read_text(),
        directives="\n".join(f"#SBATCH {_one_line(line)}" for line in _directives(options, job, num_processes)),
        grace_s=str(options.grace_s),
        environment="\n".join(_environment(options, bin_path)),
        code=shlex.quote(str(snapshot.code)),
        commit=snapshot.commit or "unknown",
        processes=f"{'' if elastic is None else 'up to '}{options.nnodes * num_processes}",
        command=shlex.quote(shlex.join(["emma-train", *train[2:]])),
        wait_s=str(options.grace_s if elastic is None else 0),
        before="" if elastic is None else _BEFORE_ELASTIC.format(logs=shlex.quote(str(job.logs))),
        after="" if elastic is None else _AFTER_ELASTIC,
        srun=("" if elastic is None else _SRUN_ELASTIC)
        + "".join(f"{shlex.quote(word)} " for word in _srun_arguments(options)),
        node=shlex.quote(node),
        train=_words(train),
        python=shlex.quote(str(bin_path / "python")),
        starts=_words([str(snapshot.folder / ("starts-{array}.json" if options.array else "starts.json"))]),
        run=_words([str(job.run)]),
        max_restarts=str(MAX_RESTARTS if options.max_restarts is None else options.max_restarts),
    )


def submit(script: str, path: Path, logs: Path) -> int:
    """Write the script and submit it with sbatch. Returns the exit code of sbatch."""
    # SLURM does not create the folder of --output: without it, a job fails without a message.
    try:
        logs.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"launch: {path}: cannot be written ({error.strerror}); set run.root") from None
    print(shell_line(["sbatch", str(path)]), flush=True)
    if shutil.which("sbatch") is None:
        raise UserError(f"launch: sbatch is not on this machine; submit {path} where SLURM is, or use --on torchrun")
    for line in queued(logs.parent):
        print(f"launch: this run has a job already: {line}; if both run at once, the later one fails")
    code = subprocess.run(["sbatch", str(path)], check=False).returncode
    if code == 0:
        print(f"its output: {logs}/slurm-*.out")
    return code


def queued(run: Path) -> list[str]:
    """Jobs of this user whose script is of the run, each with its state; none where squeue gives no answer."""
    command = ["squeue", "--me", "--noheader", "--format", "%i (%T) %o"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    split = [line.split(maxsplit=2) for line in lines]
    return [f"{words[0]} {words[1]}" for words in split if len(words) == 3 and Path(words[2]).is_relative_to(run)]


_BEFORE_ELASTIC = """# Of this start: SLURM takes a lost node out of the job.
    nodes=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%D)
    export EMMA_OUTCOME={logs}/.outcome-$SLURM_JOB_ID
    rm -f "$EMMA_OUTCOME"
    """
_SRUN_ELASTIC = '--no-kill --nodes="$nodes" --ntasks="$nodes" '
_LEAVE_CODE = '; code=$?; [ "$SLURM_NODEID" != 0 ] || echo $code > "$EMMA_OUTCOME"; exit $code'
"""The node that keeps the rendezvous knows how the job ended; the exit code of srun is that of any lost node."""
_AFTER_ELASTIC = """    [ ! -s "$EMMA_OUTCOME" ] || rc=$(cat "$EMMA_OUTCOME")
    rm -f "$EMMA_OUTCOME"
    # The agents have started the run again for as long as that may help.
    [ "$rc" != 1 ] || max_restarts=0
"""


def _directives(options: LaunchOptions, job: Job, num_processes: int) -> list[str]:
    cpus = options.cpus_per_process if options.cpus_per_process is not None else 1 + job.workers
    values = {
        "job-name": options.job_name or job.run.name.replace(ARRAY, "array"),
        "chdir": str(job.workdir),
        "output": str(job.logs / ("slurm-%A_%a.out" if options.array else "slurm-%j.out")),
        # Of a range SLURM gives the fewest nodes on which the tasks have room.
        "nodes": str(options.nnodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(num_processes * cpus),
        "gpus-per-node": str(options.gpus_per_node) if options.gpus_per_node else None,
        "time": options.time,
        **{name: getattr(options, name.replace("-", "_")) for name in _PASSED_ON},
    }
    lines = [f"--{name}={shlex.quote(value)}" for name, value in values.items() if value is not None]
    lines += ["--no-kill"] * (options.min_nodes is not None)
    return [*lines, *["--exclusive"] * options.exclusive, *options.sbatch]


_PASSED_ON = (
    "partition", "account", "qos", "mem", "exclude", "dependency", "mail-user", "mail-type", "array",
)  # fmt: skip


def _environment(options: LaunchOptions, bin_path: Path) -> list[str]:
    """Lines of bash before the run starts. A container has an environment of its own, so PATH stays as it is."""
    path = [] if options.container_image else [f"export PATH={shlex.quote(str(bin_path))}:$PATH"]
    variables = [f"export {name}={shlex.quote(value)}" for name, value in (pair.split("=", 1) for pair in options.env)]
    return [*(f"module load {shlex.quote(name)}" for name in options.module), *path, *variables, *options.setup]


def _srun_arguments(options: LaunchOptions) -> list[str]:
    image = [f"--container-image={options.container_image}"] if options.container_image else []
    mounts = [f"--container-mounts={options.container_mounts}"] if options.container_mounts else []
    return [*image, *mounts, *options.srun]


def _node_command(options: LaunchOptions, num_processes: int, elastic: Elastic | None) -> str:
    """For a shell on each node, where SLURM_* and EMMA_RENDEZVOUS are set."""
    command = f"python -m launchers.torchrun --nproc-per-node {num_processes} --shutdown-timeout {options.grace_s}"
    if options.nnodes == 1 and elastic is None:
        return f"{command} --standalone"
    # Each start of a job has a rendezvous of its own: the one of a start that ended is closed.
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint $EMMA_RENDEZVOUS --rdzv-id $SLURM_JOB_ID.$SLURM_STEP_ID"
    conf = "is_host=$((SLURM_NODEID == 0))"
    if elastic is None:
        return f"{command} --nnodes {options.nnodes} {rendezvous} --rdzv-conf {conf}"
    words = shlex.join(elastic_words(elastic, options.gpus_per_node)).replace(ARRAY, "$SLURM_ARRAY_TASK_ID")
    nodes = f"{elastic.node_counts[0]}:$SLURM_STEP_NUM_NODES"
    return f"{command} {words} --nnodes {nodes} {rendezvous} --rdzv-conf {conf},{ELASTIC_CONF}"


def _check_array(options: LaunchOptions, overrides: Sequence[str]) -> None:
    named = any(word.startswith("run.name=") and ARRAY in word for word in overrides)
    if options.array and not named:
        raise UserError(f"launch: --array runs several jobs, and each needs a name of its own: run.name=NAME-{ARRAY}")
    if not options.array and any(ARRAY in word for word in overrides):
        raise UserError(f"launch: {ARRAY} in an override needs --array, such as --array 0-2")


def first_of_array(options: LaunchOptions, overrides: Sequence[str]) -> list[str]:
    """The overrides of the first run of an array, and those of the only run without one."""
    number = re.match(r"\d+", options.array or "")
    if options.array and number is None:
        raise UserError(f"launch: --array is {options.array!r}; write numbers, such as 0-2 or 1,3,5")
    return [word.replace(ARRAY, number[0]) if number else word for word in overrides]


def _words(words: Sequence[str]) -> str:
    """As typed in bash, with the number of a run of an array in the place of {array}."""
    return shlex.join(words).replace(ARRAY, "'\"$SLURM_ARRAY_TASK_ID\"'")


def _fill(template: str, **values: str) -> str:
    """Replace each {{name}} by its value. Raises KeyError for a name without a value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _one_line(directive: str) -> str:
    if "\n" in directive or not directive.startswith("--"):
        raise UserError(f"launch: {directive!r} is no sbatch directive; write --KEY=VALUE on one line")
    return directive
