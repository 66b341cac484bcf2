"""A torchrun agent of a node, forked from a process that has imported what training imports, as are its ranks.

It is torchrun's agent in all but how it starts a rank: by a fork instead of a new interpreter, which takes most of the
time of a start on a machine with few cores.
"""

import ctypes
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
REGISTER_VARIABLE = "EMMA_CHAOS_REGISTER"
"""A folder where each agent and rank leaves a file that is named by its process."""


def run_agent(words: Sequence[str], environment: Mapping[str, str], folder: str, log: str, namespace: str) -> None:
    """launchers/torchrun.py with these words, in a folder and a network namespace ("": that of this process)."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
    register()
    from torch.distributed import run as torchrun

    from launchers.torchrun import main

    configured = torchrun.config_from_args

    def config_of_forks(arguments: Any) -> tuple[Any, Any, list[str]]:
        config, _, command = configured(arguments)
        return dataclasses.replace(config, start_method="fork"), run_rank, command[command.index("train") :]

    torchrun.config_from_args = config_of_forks
    sys.argv = ["launchers.torchrun", *words]
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_rank(*argv: str) -> int:
    """What the agent forks. Ends the process unless the exit code is 0."""
    from tests.chaos.trainer import train

    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)  # a rank that a new interpreter runs outlives its agent
    register(rank=int(os.environ["RANK"]))
    if code := train(list(argv)):
        sys.exit(code)
    return 0


def register(**values: int) -> None:
    """Leave the file, where there is a folder for it."""
    if folder := os.environ.get(REGISTER_VARIABLE):
        Path(folder, str(os.getpid())).write_text(json.dumps({"node": int(os.environ["EMMA_CHAOS_NODE"]), **values}))
