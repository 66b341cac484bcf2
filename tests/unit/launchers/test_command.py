"""The commands of `launch`, word for word."""

from pathlib import Path
from typing import Any

import pytest

from emma_train.errors import UserError
from launchers.command import Elastic, shell_line, torchrun_command, torchrun_environment
from launchers.options import LaunchOptions

RECIPE = "recipes/tiny/stage1.yaml"


def command(*overrides: str, log: Path | None = None, **options: Any) -> str:
    return shell_line(torchrun_command(RECIPE, overrides, LaunchOptions(**options), log))


def test_one_node_is_the_documented_command() -> None:
    assert command("train.steps=20", nproc=2) == (
        "python -m launchers.torchrun --standalone --nproc-per-node 2 "
        "-m emma_train train recipes/tiny/stage1.yaml train.steps=20"
    )
    assert " --log runs/a/logs/n1.log --standalone " in command(nproc=2, log=Path("runs/a/logs/n1.log"))


@pytest.mark.parametrize(("node_rank", "is_host"), [(0, 1), (1, 0)])
def test_several_nodes_meet_at_node_0(node_rank: int, is_host: int) -> None:
    assert command(nproc=8, nnodes=2, node_rank=node_rank, rdzv_endpoint="first:29500") == (
        "python -m launchers.torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first:29500 "
        f"--rdzv-conf is_host={is_host} -m emma_train train recipes/tiny/stage1.yaml"
    )


def test_restarts_turn_the_shared_store_off() -> None:
    assert command(nproc=2, max_restarts=3) == (
        "python -m launchers.torchrun --standalone --nproc-per-node 2 --max-restarts 3 "
        "-m emma_train train recipes/tiny/stage1.yaml"
    )
    assert torchrun_environment(3) == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert torchrun_environment(0) == torchrun_environment(None) == {}


def test_an_elastic_job_names_its_numbers_of_nodes() -> None:
    options = LaunchOptions(nproc=1, nnodes=5, min_nodes=2, node_rank=3, rdzv_endpoint="first:29500")
    line = shell_line(torchrun_command(RECIPE, (), options, None, Elastic((2, 3), 5, Path("/runs/a"))))
    assert line == (
        "python -m launchers.torchrun --node-counts 2,3 --run /runs/a --num-devices 0 --shutdown-timeout 300 "
        "--nnodes 2:5 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint first:29500 "
        "--rdzv-conf is_host=0,last_call_timeout=3 -m emma_train train recipes/tiny/stage1.yaml"
    )


def test_overrides_are_quoted_for_a_shell() -> None:
    assert command("resume.allow=[data.seed, mix.i2t]", nproc=1).endswith("'resume.allow=[data.seed, mix.i2t]'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"node_rank": 1}, "give --nnodes"),
        ({"nnodes": 2, "node_rank": 0}, "--rdzv-endpoint"),
        ({"nnodes": 2, "rdzv_endpoint": "first:1"}, "--node-rank"),
        ({"nnodes": 2, "rdzv_endpoint": "first:1", "node_rank": 2}, "0 to 1"),
    ],
)
def test_impossible_options_say_what_to_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        command(nproc=1, **options)
