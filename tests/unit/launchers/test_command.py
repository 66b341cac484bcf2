"""The commands of `launch`, word for word."""

import argparse

import pytest

from emma_train.errors import UserError
from launchers import command
from launchers.command import (
    LaunchOptions,
    add_launch_arguments,
    shell_line,
    torchrun_command,
    torchrun_environment,
)

RECIPE = "recipes/tiny/stage1.yaml"


def test_one_node_is_the_documented_command() -> None:
    line = shell_line(torchrun_command(RECIPE, ["train.steps=20"], nproc=2))
    assert line == (
        "torchrun --standalone --nproc-per-node 2 -m emma_train train recipes/tiny/stage1.yaml train.steps=20"
    )


@pytest.mark.parametrize(("node_rank", "is_host"), [(0, 1), (1, 0)])
def test_several_nodes_meet_at_node_0(node_rank: int, is_host: int) -> None:
    line = shell_line(torchrun_command(RECIPE, nproc=8, nnodes=2, node_rank=node_rank, rdzv_endpoint="first:29500"))
    assert line == (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first:29500 "
        f"--rdzv-conf is_host={is_host} -m emma_train train recipes/tiny/stage1.yaml"
    )


def test_restarts_turn_the_shared_store_off() -> None:
    line = shell_line(torchrun_command(RECIPE, nproc=2, max_restarts=3), torchrun_environment(3))
    assert line == (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 "
        "-m emma_train train recipes/tiny/stage1.yaml"
    )
    assert torchrun_environment(0) == {}


def test_overrides_are_quoted_for_a_shell() -> None:
    line = shell_line(torchrun_command(RECIPE, ["resume.allow=[data.seed, mix.i2t]"]))
    assert line.endswith("'resume.allow=[data.seed, mix.i2t]'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nproc": 0}, "--nproc is 0"),
        ({"nnodes": 0}, "--nnodes is 0"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
        ({"node_rank": 1}, "give --nnodes"),
        ({"nnodes": 2, "node_rank": 0}, "--rdzv-endpoint"),
        ({"nnodes": 2, "rdzv_endpoint": "first:1"}, "--node-rank"),
        ({"nnodes": 2, "rdzv_endpoint": "first:1", "node_rank": 2}, "0 to 1"),
    ],
)
def test_impossible_options_say_what_to_do(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        torchrun_command(RECIPE, **options)


def test_options_and_overrides_may_be_mixed() -> None:
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    arguments, overrides = parser.parse_known_args([RECIPE, "--on", "slurm", "train.steps=5", "--nnodes", "2", "a.b=c"])
    assert overrides == ["train.steps=5", "a.b=c"]
    assert LaunchOptions.from_arguments(arguments) == LaunchOptions(on="slurm", nnodes=2, sbatch=[])


def test_defaults_of_parser_and_options_agree() -> None:
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    assert LaunchOptions.from_arguments(parser.parse_args([RECIPE])) == LaunchOptions(sbatch=[])


def test_run_torchrun_becomes_the_command_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list = []
    monkeypatch.setattr(command.os, "execvpe", lambda *words: became.extend(words))
    command.run_torchrun(torchrun_command(RECIPE), torchrun_environment(1))
    program, argv, environment = became
    assert program == argv[0] == str(command.bin_directory() / "torchrun")
    assert argv[1:] == ["--standalone", "--nproc-per-node", "1", "-m", "emma_train", "train", RECIPE]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "PATH" in environment
