"""The parser's frame: every command is registered, and what no command understands is bad usage."""

import subprocess
import sys
from pathlib import Path

import pytest

from emma_train import cli, commands

RECIPE = "recipes/tiny/stage1.yaml"


def test_every_file_of_commands_with_options_is_a_command() -> None:
    folder = Path(commands.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\ndef add_arguments" in path.read_text()}
    assert {module.__name__.rsplit(".", 1)[1] for module in cli.COMMANDS.values()} == modules


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["launch", RECIPE, "train.steps=5", "--nprocs", "2"], "launch: did not understand '--nprocs'; overrides are"),
        (["train", RECIPE, "stage1"], "train: did not understand 'stage1'; overrides are key=value"),
        (["inspect", "runs/demo", "train.steps=5"], "inspect: did not understand 'train.steps=5'"),
        (["trian", RECIPE], "invalid choice: 'trian'"),
    ],
)
def test_what_is_neither_option_nor_override_is_bad_usage(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_no_large_library() -> None:
    code = (
        "import sys; from emma_train.cli import COMMANDS; "
        "print([m for m in ('torch', 'numpy', 'omegaconf', 'rich', 'PIL', 'data_pipelines') if m in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "[]"
