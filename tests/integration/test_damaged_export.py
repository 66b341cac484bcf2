"""Damage to an export: refused in one line that names the file, by the commands that read it."""

import json
import shutil
from pathlib import Path

import pytest

from emma_train.storage.files import write_atomic
from tests.distributed.ranks import command
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe, write_export
from tests.integration.conftest import MakeRecipe

QUESTION = ["--task", "t2i", "--prompt", "a cat", "--steps", "1", "--size", "32", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("damaged") / "export"
    write_export(out, tiny_recipe("stage1"))
    return out


@pytest.fixture
def export(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "export"))


def flip(file: Path, part: float) -> None:
    """Flip a bit of the byte at a part of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * part)] ^= 4
    file.write_bytes(content)


def refused(*argv: str) -> str:
    """The line with which a command ends."""
    (outcome,) = run_ranks(1, command, list(argv))
    assert outcome.value == 2, outcome.err
    return outcome.error_lines[-1]


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.yaml"])
def test_a_flipped_bit_of_weights_or_recipe_is_refused(
    export: Path, make_recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    flip(export / name, 0.9)
    recipe = make_recipe(tmp_path, "stage2")
    for argv in (
        ("generate", str(export), *QUESTION),
        ("export", str(export), str(tmp_path / "out")),
        ("train", str(recipe), f"init.from={export}"),
    ):
        assert f"export/{name}: is not what was exported; copy it there again" in refused(*argv)


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.yaml"])
def test_an_export_without_a_file_is_named_as_one(export: Path, name: str) -> None:
    (export / name).unlink()
    assert f"export/{name}: missing from this export" in refused("generate", str(export), *QUESTION)


def test_metadata_that_is_gone_or_other_is_refused(export: Path) -> None:
    meta = export / "meta.json"
    values = json.loads(meta.read_text())
    for content, message in (
        (json.dumps({**values, "step": 2}), "is damaged"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "does not tell stage and step"),
        ("", "not valid JSON"),
    ):
        meta.write_text(content)
        assert message in refused("generate", str(export), *QUESTION)
    meta.unlink()
    assert "meta.json: cannot be read (No such file or directory)" in refused("generate", str(export), *QUESTION)


def test_an_older_export_has_no_hashes_and_is_used(export: Path, tmp_path: Path) -> None:
    meta = export / "meta.json"
    values = {key: value for key, value in json.loads(meta.read_text()).items() if key not in ("files", "checksum")}
    write_atomic(meta, json.dumps(values))
    (outcome,) = run_ranks(1, command, ["generate", str(export), *QUESTION, "--out", str(tmp_path / "images")])
    assert outcome.value == 0, outcome.err


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "autoencoder/config.json: not valid JSON"), ("{}", "its weights belong to another model.autoencoder.path")],
)
def test_an_autoencoder_with_another_config_is_refused(export: Path, content: str, message: str) -> None:
    (export / "autoencoder" / "config.json").write_text(content)
    assert message in refused("generate", str(export), *QUESTION)


def test_a_tokenizer_that_is_no_text_is_refused(export: Path) -> None:
    (export / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    assert "tokenizer.json: not a tokenizer.json (no text in UTF-8)" in refused("generate", str(export), *QUESTION)
