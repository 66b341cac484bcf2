"""Options and folders that a command cannot use: one line on stderr and exit code 2, before anything is written."""

import resource
from pathlib import Path

import pytest
import torch

from tests import public
from tests.distributed.ranks import command
from tests.distributed.spawn import run_command, run_ranks
from tests.fuzz import limited_command
from tests.helpers import ASSETS, tiny_recipe, write_export
from tests.integration.conftest import MakeRecipe

QUESTION = ["--task", "t2i", "--prompt", "a cat", "--steps", "1", "--size", "32", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("options") / "export"
    write_export(out, tiny_recipe())
    (out.parent / "file").write_text("a file")
    return out


def line_of(*argv: str) -> str:
    (outcome,) = run_ranks(1, command, list(argv))
    (line,) = outcome.error_lines
    assert outcome.value == 2
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", "MODEL", *QUESTION, "--out", "FILE"], "file: cannot make this folder (File exists)"),
        (["generate", "MODEL", *QUESTION, "--out", "/proc/none"], "/proc/none: cannot make this folder"),
        (["generate", "MODEL", *QUESTION, "--batch", "0"], "--batch is 0; give a number from 1 to"),
        (["generate", "MODEL", *QUESTION, "--batch", "-1"], "--batch is -1; give a number from 1 to"),
        (["generate", "MODEL", *QUESTION, "--num", "-1"], "--num is -1; give a number from 1 to"),
        (["export", "MODEL", "/proc/none"], "/proc/none: cannot make this folder"),
        (["export", "MODEL", "/proc/none", "--as", "qwen3"], "/proc/none: cannot make this folder"),
        (["evaluate", "MODEL", "--out", "PARENT"], "is a folder; name a file"),
        (["evaluate", "MODEL", "--limit", "-1"], "--limit is -1; give a number from 0 to"),
        (["plan", "recipes/tiny/stage1.yaml", "--gpus", "0"], "--gpus is 0; give a number from 1 to"),
        (["report", "PARENT"], "holds no run"),
        (["inspect", "MODEL"], "is an export, not a checkpoint; its meta.json says what it was made from"),
        (["generate", "MODEL", *QUESTION, "--max-tokens", "1000000"], "--max_tokens is 1000000; it is a number from 0"),
        (["generate", "MODEL", *QUESTION, "--size", "32768", "32"], "both must be multiples of 32 up to 16384"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_a_command_names_what_it_cannot_use(model: Path, argv: list[str], words: str) -> None:
    paths = {"MODEL": str(model), "FILE": str(model.parent / "file"), "PARENT": str(model.parent)}
    assert words in line_of(*(paths.get(word, word) for word in argv))
    assert not (model.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("module", "argv", "words"),
    [
        ("emma_train", ["inspect", ""], "inspect: an argument is empty; give it a value"),
        ("emma_train", ["export", "run", "out", "--as="], "argument --as: invalid choice: ''"),
        ("emma_train", ["plan", "recipe.yaml", "--gpu="], "plan: --gpu is empty; give it a value"),
        (
            "emma_train",
            ["generate", "run", "--task", "t2i", "--prompt", "x", "--device", "gpu"],
            "--device: invalid choice",
        ),
        ("data_pipelines", ["index", "", "--tokenizer", "x"], "an argument is empty; give it a value"),
        ("data_pipelines", ["check", ""], "an argument is empty; give it a value"),
        (
            "data_pipelines",
            ["cache-latents", ".", "--autoencoder", "x", "--side", "0"],
            "--side is 0; it must be more than 0",
        ),
    ],
)
def test_arguments_that_are_none(tmp_path: Path, module: str, argv: list[str], words: str) -> None:
    (outcome,) = run_ranks(1, limited_command, argv, str(tmp_path), module)
    assert outcome.value == 2 and words in outcome.error_lines[-1]


def test_index_needs_a_tokenizer_and_takes_its_folder(tmp_path: Path) -> None:
    outcome = run_command("index", str(tmp_path), module="data_pipelines", code=2)
    assert "the following arguments are required: --tokenizer" in outcome.err
    (outcome,) = run_ranks(
        1, limited_command, ["index", "x", "--tokenizer", str(ASSETS / "tokenizer")], str(tmp_path), "data_pipelines"
    )
    assert outcome.value == 2 and "x: no *.tar in it" in outcome.err


def test_import_names_sizes_and_values_that_are_none(tmp_path: Path) -> None:
    public.llm(tmp_path / "llm", num_hidden_layers=2)
    public.vision(tmp_path / "vision")
    folders = {"llm": tmp_path / "llm", "vision": tmp_path / "vision", "autoencoder": ASSETS / "autoencoder"}
    options = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    words = ["import", str(tmp_path / "out"), *options, "--tokenizer", str(ASSETS / "tokenizer")]
    for part, key, value in (
        ("llm", "hidden_size", "abc"),
        ("llm", "hidden_size", -96),
        ("llm", "rms_norm_eps", "x"),
        ("vision", "patch_size", 0),
    ):
        before = (tmp_path / part / "config.json").read_text()
        with public.config_of(tmp_path / part) as values:
            values[key] = value
        assert f"{part}/config.json: {key} is {value!r}; it must be a" in line_of(*words)
        (tmp_path / part / "config.json").write_text(before)
    for bad, message in (
        (torch.full((32,), torch.nan), "model.norm.weight holds values that are not finite"),
        (torch.ones(32, dtype=torch.int64), "model.norm.weight is of type I64, not of floats"),
    ):
        public.change(tmp_path / "llm", lambda tensors, bad=bad: {**tensors, "model.norm.weight": bad})
        assert message in line_of(*words)
    assert not (tmp_path / "out").exists()


def few_files(argv: list[str], limit: int) -> int:
    """A command that may open `limit` files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return command(argv)


def test_too_few_open_files_are_told_before_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (outcome,) = run_ranks(1, few_files, ["train", str(make_recipe(tmp_path))], 24)
    (line,) = outcome.error_lines
    assert outcome.value == 2 and "a process may open 24 files, too few to train; raise it: ulimit -n 64" in line
