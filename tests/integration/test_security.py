"""What others wrote runs nothing, and reads and writes nothing outside of its folder: every command, as a user calls it
(docs/security.md)."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from emma_train.checkpoint import dcp
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.verify import file_entry
from tests.distributed.ranks import command
from tests.distributed.spawn import run_command, run_ranks
from tests.helpers import ASSETS
from tests.integration.conftest import FIXTURE

RECIPE = str(FIXTURE / "recipe.yaml")
STEP = "step-00000004"
QUESTION = ("--task", "i2t", "--device", "cpu", "--prompt", "What?", "--image", str(FIXTURE / "image.webp"))


class Crafted:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def sign(checkpoint: Path, **changes: Any) -> None:
    """Write meta.json anew with checksums of what the files hold now, as one who crafts a checkpoint would."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    del meta["checksum"]
    meta["files"] = {name: file_entry(checkpoint / name) for name in meta["files"]}
    meta |= changes
    (checkpoint / "meta.json").write_text(json.dumps({**meta, "checksum": folders.checksum(meta)}))


def commands_on(run: Path, out: Path) -> dict[str, list[str]]:
    """Every command that reads a checkpoint."""
    return {
        "resume": ["train", RECIPE, f"run.root={run.parent}"],
        "init": ["train", RECIPE, f"run.root={out}", f"init.from={run}", "stage.name=stage2", "train.steps=1"],
        "inspect": ["inspect", str(run)],
        "verify": ["inspect", str(run), "--verify"],
        "copy": ["inspect", str(run), "--self-contained", str(out / "copy")],
        "export": ["export", str(run), str(out / "export")],
        "qwen3": ["export", str(run), str(out / "qwen3"), "--as", "qwen3"],
        "generate": ["generate", str(run), *QUESTION],
    }


def refused(argv: list[str], message: str, code: int = 2) -> None:
    """The command ends with the code and one line that holds the message."""
    (outcome,) = run_ranks(1, command, argv, timeout_s=60)
    assert outcome.value == code, (argv, outcome.out, outcome.err)
    assert "Traceback" not in outcome.err
    line = outcome.out if code == 1 else outcome.error_lines[-1]
    assert message in line, (argv, line)


READ_TENSORS = ("resume", "init", "export", "qwen3", "generate")


@pytest.mark.parametrize("kind", ["command", "bytes"])
def test_a_crafted_table_of_contents_runs_nothing(run: Path, tmp_path: Path, kind: str) -> None:
    checkpoint, marker = run / "checkpoints" / STEP, tmp_path / "ran"
    contents = checkpoint / "weights" / dcp.DCP_METADATA
    metadata = pickle.loads(contents.read_bytes())
    if kind == "command":
        metadata.planner_data = Crafted(os.system, f"touch {marker}")
    else:  # DCP would unpickle the bytes of the shard
        name = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    contents.write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    name = "BytesStorageMetadata" if kind == "bytes" else ""
    for number, argv in commands_on(run, tmp_path / "out").items():
        if number in READ_TENSORS:
            refused(argv, f"{name}, which no table of contents of tensors needs; do not trust it")
        elif number == "verify":
            refused(argv, "which no table of contents of tensors needs; do not trust it", code=1)
        assert not marker.exists()


@pytest.mark.parametrize("name", ["../../secret.distcp", "/etc/hostname", "..\\secret"])
def test_a_table_of_contents_names_no_file_outside(run: Path, tmp_path: Path, name: str) -> None:
    checkpoint = run / "checkpoints" / STEP
    contents = checkpoint / "weights" / dcp.DCP_METADATA
    metadata = pickle.loads(contents.read_bytes())
    for part in metadata.storage_data.values():
        part.relative_path = name
    contents.write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    refused(commands_on(run, tmp_path / "out")["export"], "names a file outside its folder")


@pytest.mark.parametrize(
    "changes", [{"frozen": "../../elsewhere"}, {"frozen": "/etc"}, {"files": {"../secret": {"bytes": 1, "sha256": ""}}}]
)
def test_metadata_names_nothing_outside(run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    sign(run / "checkpoints" / STEP, **changes)
    for argv in commands_on(run, tmp_path / "out").values():
        refused(argv, "outside the checkpoint; do not trust it")
    assert not (tmp_path / "out" / "copy").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.name", "${oc.env:HOME}", "is not replaced in a recipe"),
        ("optimizer.lr", "${oc.env:SECRET,1}", "is not replaced in a recipe"),
        ("data.tokenizer", "../elsewhere/tokenizer.json", "outside the export"),
        ("model.autoencoder.path", "/elsewhere", "outside the export"),
        ("extends", "../elsewhere.yaml", "has extends"),
    ],
)
def test_the_recipe_of_an_export_reads_neither_environment_nor_other_files(
    export: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    path = export / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    *sections, leaf = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[leaf] = value
    path.write_text(yaml.safe_dump(values))
    commands = commands_on(export, tmp_path / "out")
    for name in ("export", "generate"):
        refused(commands[name], message)
    if "outside" not in message:  # a start reads neither tokenizer nor autoencoder of an export
        refused(commands["init"], message)


def test_the_recipe_of_a_checkpoint_and_of_a_run_folder_reads_no_environment(run: Path, tmp_path: Path) -> None:
    meta = folders.read_meta(run / "checkpoints" / STEP) or {}
    sign(run / "checkpoints" / STEP, config={**meta["config"], "ema": {"decay": "${oc.env:SECRET}"}})
    commands = commands_on(run, tmp_path / "out")
    for name in ("export", "generate"):
        refused(commands[name], "is not replaced in a recipe")
    (run / "config.yaml").write_text("extends: ../elsewhere.yaml\n")
    for name in ("init", "inspect", "export", "generate"):
        refused(commands[name], "has extends")


def test_a_recipe_replaces_no_variable(tmp_path: Path) -> None:
    argv = ["train", RECIPE, f"run.root={tmp_path}"]
    refused([*argv, "run.name=${oc.env:HOME}"], "'${oc.env:HOME}' is not replaced in a recipe; write the value itself")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"extends": RECIPE, "optimizer": {"lr": "${oc.decode:${oc.env:LR}}"}}))
    for name in ("train", "plan"):
        refused([name, str(path)], "is not replaced in a recipe")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", 5])
def test_an_index_of_weights_names_no_file_outside(tmp_path: Path, name: Any) -> None:
    autoencoder = ASSETS / "autoencoder"
    llm = tmp_path / "llm"
    llm.mkdir()
    config = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 1024,
              "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}  # fmt: skip
    (llm / "config.json").write_text(json.dumps(config))
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    vision = tmp_path / "vision"
    vision.mkdir()
    config = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
              "intermediate_size": 48, "patch_size": 16, "image_size": 64}  # fmt: skip
    (vision / "config.json").write_text(json.dumps(config))
    shutil.copy(ASSETS / "tokenizer" / "tokenizer.json", llm)
    argv = ["import", str(tmp_path / "out"), "--llm", str(llm), "--vision", str(vision), "--autoencoder"]
    refused([*argv, str(autoencoder)], f"weight_map names {name!r}, which is no file in its folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "../shard-000000.tar"), ("name", "/etc/shard.tar"), ("sha256", "../../../../x"), ("index_sha256", "")],
)
def test_a_manifest_names_nothing_outside(tmp_path: Path, key: str, value: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(ASSETS / "emoji" / "train", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(["train", RECIPE, f"run.root={tmp_path}", f"data.sources=[{{path: {folder}}}]"], repr(value))
    outcome = run_command("check", str(folder), module="data_pipelines", code=2)
    assert repr(value) in outcome.error_lines[-1]


def test_passwords_and_tokens_of_urls_are_in_no_file_and_no_message(run: Path, tmp_path: Path) -> None:
    secret = "https://user:PASS@127.0.0.1:1/data?token=TOKEN"
    out = tmp_path / "out"
    argv = ["train", RECIPE, f"run.root={out}", f"train.sample_from={secret}", "data.read_retries=0"]
    (outcome,) = run_ranks(1, command, argv)
    assert outcome.value in (1, 2) and "127.0.0.1" in outcome.err
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert not any(word in outcome.err or word.encode() in written for word in ("PASS", "TOKEN"))
