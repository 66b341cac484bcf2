"""URLs on command lines that lack a bucket or host, or stand where a local folder must: one line, exit code 2."""

from pathlib import Path

import pytest

from data_pipelines.cli import main as data_main
from emma_train.cli import main
from tests.helpers import ASSETS, recipe_values, tiny_recipe, write_export, write_recipe

NO_BUCKET = ["s3://", "s3:///x", "gs://", "https://", "https:///x"]
QUESTION = ["--task", "t2i", "--prompt", "a cat", "--device", "cpu"]
TOKENIZER = ["--tokenizer", str(ASSETS / "tokenizer")]


def line_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    return line


@pytest.mark.parametrize("url", NO_BUCKET)
@pytest.mark.parametrize(
    "argv",
    [
        ["train", "RECIPE", "init.from=URL"],
        ["train", "RECIPE", "train.checkpoints=URL"],
        ["train", "RECIPE", "data.sources=[{path: 'URL'}]"],
        ["inspect", "URL"],
        ["inspect", "URL", "--verify"],
        ["export", "URL", "OUT"],
        ["generate", "URL", *QUESTION],
        ["evaluate", "URL"],
        ["emma-data", "check", "URL"],
        ["emma-data", "stats", "URL"],
        ["emma-data", "import", "shards", "OUT", "URL", *TOKENIZER],
    ],
    ids=" ".join,
)
def test_a_url_without_a_bucket_is_one_line(
    argv: list[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    words = [word.replace("URL", url).replace("RECIPE", str(recipe)).replace("OUT", "out") for word in argv]
    code = data_main(words[1:]) if words[0] == "emma-data" else main(words)
    assert "needs a bucket or host" in line_of(capsys, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]  # no folder named s3:


@pytest.mark.parametrize(
    "argv",
    [
        ["export", "MODEL", "URL"],
        ["export", "MODEL", "URL", "--as", "qwen3"],
        ["generate", "MODEL", *QUESTION, "--out", "URL"],
        ["evaluate", "MODEL", "--out", "URL/scores.json"],
        ["emma-data", "index", "URL", *TOKENIZER],
        ["emma-data", "cache-latents", "URL", "--autoencoder", str(ASSETS / "autoencoder")],
        ["emma-data", "import", "shards", "URL", "x.tar", *TOKENIZER],
    ],
    ids=" ".join,
)
def test_a_url_in_the_position_of_a_local_folder_is_one_line(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "model", tiny_recipe())
    words = [word.replace("URL", "s3://bucket/x").replace("MODEL", str(tmp_path / "model")) for word in argv]
    code = data_main(words[1:]) if words[0] == "emma-data" else main(words)
    assert "this must be a local path, not a URL" in line_of(capsys, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
