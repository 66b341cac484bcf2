"""Options of `launch`: nothing is accepted and ignored, and a site file gives the values of a cluster."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from emma_train.errors import UserError
from launchers.options import SITE_VARIABLE, LaunchOptions, add_launch_arguments

RECIPE = "recipes/tiny/stage1.yaml"


def parse(*words: str) -> LaunchOptions:
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    return LaunchOptions.from_arguments(parser.parse_known_args([RECIPE, *words])[0])


def test_without_options_all_have_their_defaults() -> None:
    assert parse() == LaunchOptions()


def test_options_and_overrides_may_be_mixed() -> None:
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    arguments, overrides = parser.parse_known_args([RECIPE, "--on", "slurm", "train.steps=5", "--nnodes", "2", "a.b=c"])
    assert overrides == ["train.steps=5", "a.b=c"]
    assert LaunchOptions.from_arguments(arguments) == LaunchOptions(on="slurm", nnodes=2)


def test_nodes_are_a_number_or_a_range(tmp_path: Path) -> None:
    given = parse("--nnodes", "2:4")
    assert (given.min_nodes, given.nnodes) == (2, 4)
    assert (parse("--nnodes", "4").min_nodes, parse("--nnodes", "4").nnodes) == (None, 4)
    site = tmp_path / "site.yaml"
    site.write_text('nnodes: "2:4"')
    assert parse("--site", str(site)) == given
    assert parse("--site", str(site), "--nnodes", "3") == LaunchOptions(nnodes=3)


@pytest.mark.parametrize("entry", [e for e in fields(LaunchOptions) if e.metadata["on"]], ids=lambda e: e.name)
def test_an_option_of_the_other_launcher_is_refused(entry) -> None:
    other = {"slurm": "torchrun", "torchrun": "slurm"}[entry.metadata["on"]]
    flag = "--" + entry.name.replace("_", "-")
    value = [] if entry.type is bool else ["1"] if entry.name != "env" else ["A=1"]
    with pytest.raises(UserError, match=rf"launch: {flag} is an option of --on {entry.metadata['on']}"):
        parse("--on", other, flag, *value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "0"], "--nnodes is 0; it must be at least 1"),
        (["--nnodes", "4:2"], "--nnodes is 4:2; MIN must be at least 1 and at most MAX"),
        (["--nnodes", "0:2"], "MIN must be at least 1"),
        (["--nnodes", "two"], "--nnodes is 'two'; write a number, or MIN:MAX such as 2:4"),
        (["--nproc", "0"], "--nproc is 0"),
        (["--max-restarts", "-1"], "--max-restarts is -1"),
        (["--on", "slurm", "--gpus-per-node", "-1"], "--gpus-per-node is -1"),
        (["--on", "slurm", "--cpus-per-process", "1000000"], "--cpus-per-process is 1000000"),
        (["--on", "slurm", "--env", "NCCL_DEBUG"], "--env 'NCCL_DEBUG' is not NAME=VALUE"),
    ],
)
def test_impossible_values_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*words)


def test_a_site_file_gives_values_under_those_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "on: slurm\npartition: gpu\ngpus-per-node: 4\nexclusive: true\nmodule: [cuda/12.8]\n"
        "env: {NCCL_SOCKET_IFNAME: ib0}\nsetup: |\n  ulimit -l unlimited\n  source env.sh\n"
    )
    given = parse("--site", str(site), "--partition", "debug", "--env", "NCCL_DEBUG=INFO")
    assert (given.on, given.partition, given.gpus_per_node, given.exclusive) == ("slurm", "debug", 4, True)
    assert given.env == ["NCCL_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO"]
    assert given.setup == ["ulimit -l unlimited", "source env.sh"]
    monkeypatch.setenv(SITE_VARIABLE, str(site))
    assert parse().partition == "gpu"
    assert parse("--on", "torchrun").on == "torchrun"  # values for SLURM in a site file do not disturb


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton: gpu", "unknown option partiton; did you mean partition?"),
        ("dry_run: true", "unknown option dry_run"),
        ("nnodes: two", "nnodes must be a whole number, found 'two'"),
        ("exclusive: 1", "exclusive must be true or false"),
        ("time: 8:00:00", "time must be a text; write it in quotes"),
        ("module: 3", "module is a list of texts"),
        ("- a", "must be a mapping of options"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_site_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(UserError, match=rf"^launch: --site {site}: ") as caught:
        parse("--site", str(site))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_site_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--site .*none\.yaml: cannot be read"):
        parse("--site", str(tmp_path / "none.yaml"))
