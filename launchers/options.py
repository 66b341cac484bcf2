"""The options of `launch`: the command line, over a site file, over the defaults."""

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from emma_train.errors import UserError

SITE_VARIABLE = "EMMA_SITE"
"""Names the site file where --site does not."""


def option(default: Any, text: str, *, on: str = "", metavar: str = "", span: tuple[int, int] | None = None) -> Any:
    """An option. on: the launcher that has it (empty: both); span: lowest and highest value of a number."""
    facts = {"help": text, "on": on, "metavar": metavar, "span": span}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class LaunchOptions:
    """How and where a run starts. What it trains is in the recipe."""

    on: str = option("torchrun", "torchrun: this machine, or one node of several; slurm: submit a job")
    nnodes: int = option(
        1,
        "nodes; MIN:MAX for a run that goes on while nodes are lost and come back",
        metavar="N|MIN:MAX",
        span=(1, 100_000),
    )
    min_nodes: int | None = option(None, "")
    """The MIN of --nnodes MIN:MAX; None where the number of nodes is fixed. Not an option of its own."""
    nproc: int | None = option(None, "processes on a node; default: its GPUs, or 1", metavar="N", span=(1, 1024))
    gpu: str | None = option(None, "kind of GPU, such as h100-80g: then memory is checked too", metavar="KIND")
    max_restarts: int | None = option(
        None,
        "starts again after a process died (slurm: until the job is requeued); default: torchrun 0, slurm 3",
        metavar="N",
        span=(0, 1_000_000),
    )
    dry_run: bool = option(False, "check, print the command or script, and start nothing")

    node_rank: int | None = option(None, "several nodes: number of this one", on="torchrun", metavar="I")
    rdzv_endpoint: str | None = option(None, "several nodes: an address of node 0", on="torchrun", metavar="HOST:PORT")

    gpus_per_node: int = option(8, "0 for a cluster of CPUs", on="slurm", metavar="N", span=(0, 1024))
    cpus_per_process: int | None = option(
        None, "default: one, and one for each loader worker (data.workers)", on="slurm", metavar="N", span=(1, 4096)
    )
    time: str = option("24:00:00", "limit of the job, in any form of SLURM: 4:00 is four minutes", on="slurm")
    grace_s: int = option(
        300, "seconds before the limit at which the run saves and stops", on="slurm", metavar="S", span=(1, 1_000_000)
    )
    job_name: str | None = option(None, "default: the name of the run", on="slurm", metavar="NAME")
    partition: str | None = option(None, "SLURM partition, of which sinfo prints the names", on="slurm", metavar="NAME")
    account: str | None = option(None, "SLURM account that the job is charged to", on="slurm", metavar="NAME")
    qos: str | None = option(None, "SLURM quality of service", on="slurm", metavar="NAME")
    mem: str | None = option(None, "host memory of a node; 0: all of it", on="slurm", metavar="SIZE")
    exclusive: bool = option(False, "share nodes with no other job", on="slurm")
    exclude: str | None = option(None, "nodes not to run on", on="slurm", metavar="NODES")
    dependency: str | None = option(None, "such as afterok:123", on="slurm", metavar="LIST")
    mail_user: str | None = option(None, "address to write to", on="slurm", metavar="ADDRESS")
    mail_type: str | None = option(None, "such as FAIL,END", on="slurm", metavar="TYPES")
    array: str | None = option(
        None, "several runs: {array} in overrides is the number of each, as in run.name=s-{array}", on="slurm"
    )
    sbatch: Sequence[str] = option((), "any further directive", on="slurm", metavar="--KEY=VALUE")
    srun: Sequence[str] = option((), "any further argument of srun", on="slurm", metavar="--KEY=VALUE")
    container_image: str | None = option(None, "image of pyxis/enroot", on="slurm", metavar="IMAGE")
    container_mounts: str | None = option(None, "folders to mount in it", on="slurm", metavar="LIST")
    module: Sequence[str] = option((), "module to load", on="slurm", metavar="NAME")
    setup: Sequence[str] = option((), "line of bash before the run starts", on="slurm", metavar="LINE")
    env: Sequence[str] = option((), "environment variable of all processes", on="slurm", metavar="NAME=VALUE")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "LaunchOptions":
        """The options of a parsed command line and of its site file. Raises UserError."""
        given = {entry.name: getattr(arguments, entry.name) for entry in fields(cls) if hasattr(arguments, entry.name)}
        site = getattr(arguments, "site", None) or os.environ.get(SITE_VARIABLE)
        values = read_site(Path(site)) if site else {}
        for name, value in given.items():
            values[name] = [*values.get(name, ()), *value] if isinstance(value, list) else value
        if isinstance(values.get("nnodes"), str):
            values |= _node_range(values["nnodes"])
        options = cls(**values)
        if options.on not in LAUNCHERS:
            raise UserError(f"launch: --on is {options.on!r}; it can be {' or '.join(LAUNCHERS)}")
        for entry in fields(cls):
            if entry.name in given and entry.metadata["on"] not in ("", options.on):
                raise UserError(f"launch: {_flag(entry)} is an option of --on {entry.metadata['on']}; leave it out")
            _check_span(entry, getattr(options, entry.name))
        for pair in options.env:
            if not re.fullmatch(r"[A-Za-z_]\w*=[^\n]*", pair):
                raise UserError(f"launch: --env {pair!r} is not NAME=VALUE")
        return options


LAUNCHERS = ("torchrun", "slurm")
DERIVED = ("min_nodes",)
"""Fields that follow from another option."""


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE and the options. `parse_known_args` returns key=value overrides unparsed."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, as for `train`; key=value overrides may follow")
    parser.add_argument(
        "--site",
        metavar="FILE",
        help=f"YAML with values of these options for a cluster, under their names; default: ${SITE_VARIABLE}",
    )
    groups = {name: parser.add_argument_group(f"--on {name}") for name in LAUNCHERS}
    for entry in fields(LaunchOptions):
        if entry.name in DERIVED:
            continue
        group = groups.get(entry.metadata["on"], parser)
        text, metavar = entry.metadata["help"], entry.metadata["metavar"] or None
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text or None}
        if entry.default not in (None, (), False):
            more["help"] = f"{text}; default: {entry.default}"
        if entry.type is bool:
            group.add_argument(_flag(entry), action="store_true", **more)
        elif entry.default == ():
            more["help"] = f"{text}; may be repeated"
            group.add_argument(_flag(entry), action="append", metavar=metavar, **more)
        elif entry.name == "on":
            group.add_argument(_flag(entry), choices=LAUNCHERS, **more)
        else:
            is_number = entry.name != "nnodes" and (entry.metadata["span"] or entry.name == "node_rank")
            kind = int if is_number else str
            group.add_argument(_flag(entry), type=kind, metavar=metavar or entry.name.upper(), **more)


def read_site(path: Path) -> dict[str, Any]:
    """Values of options from a site file. `env` may be a mapping. Raises UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"launch: --site {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"launch: --site {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"launch: --site {path}: must be a mapping of options, such as partition: gpu")
    # YAML 1.1 reads the key `on` as true.
    named = {"on" if key is True else str(key): value for key, value in values.items()}
    return dict(_site_value(key, value, f"--site {path}") for key, value in named.items())


def _site_value(key: str, value: Any, source: str) -> tuple[str, Any]:
    known = {entry.name: entry for entry in fields(LaunchOptions) if entry.name not in ("dry_run", *DERIVED)}
    entry = known.get(key.replace("-", "_"))
    if entry is None:
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.0)[0]
        raise UserError(f"launch: {source}: unknown option {key}; did you mean {near}?")
    if entry.name == "env" and isinstance(value, Mapping):
        return entry.name, [f"{name}={content}" for name, content in value.items()]
    if entry.name == "nnodes" and isinstance(value, str) and ":" in value:
        return entry.name, value
    if entry.default == ():
        lines = value.splitlines() if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise UserError(f"launch: {source}: {key} is a list of texts, found {value!r}")
        return entry.name, lines
    kind = bool if entry.type is bool else int if entry.metadata["span"] or entry.name == "node_rank" else str
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        # YAML reads 8:00:00 as a number in base 60, which nobody means.
        raise UserError(f'launch: {source}: {key} must be a text; write it in quotes, as in {key}: "..."')
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"launch: {source}: {key} must be {_KINDS[kind]}, found {value!r}")
    return entry.name, value


_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", str: "a text"}


def _node_range(text: str) -> dict[str, int | None]:
    """Values of nnodes and min_nodes for `N` or `MIN:MAX`. Raises UserError."""
    match = re.fullmatch(r"(?:(\d{1,6}):)?(-?\d{1,6})", text)
    if match is None:
        raise UserError(f"launch: --nnodes is {text!r}; write a number, or MIN:MAX such as 2:4")
    least, most = int(match[1]) if match[1] else None, int(match[2])
    if least is not None and not 1 <= least <= most:
        raise UserError(f"launch: --nnodes is {text}; MIN must be at least 1 and at most MAX")
    return {"nnodes": most, "min_nodes": least}


def _flag(entry: "Field[Any]") -> str:
    return "--" + entry.name.replace("_", "-")


def _check_span(entry: "Field[Any]", value: int | None) -> None:
    span = entry.metadata["span"]
    if span and value is not None and not span[0] <= value <= span[1]:
        raise UserError(f"launch: {_flag(entry)} is {value}; it must be at least {span[0]} and at most {span[1]}")
