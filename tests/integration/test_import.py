"""`emma-train import`, and stages that start from it: through the command line, on one process and on two."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from emma_train.config.schema import Recipe
from emma_train.export import export
from tests import public
from tests.distributed.ranks import command, command_memory, loaded, start_memory
from tests.distributed.spawn import run_command, run_ranks
from tests.helpers import ASSETS, ROOT, tiny_recipe
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, stored, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders like the public ones, of the small recipe's sizes; `initial` holds the import of them."""
    folder = tmp_path_factory.mktemp("import")
    public.llm(folder / "llm", num_hidden_layers=2, shard="50KB")
    public.vision(folder / "vision")
    public.autoencoder(folder / "autoencoder")
    (outcome,) = run_ranks(1, command, words(folder))
    assert outcome.value == 0, outcome.err
    assert outcome.out.splitlines()[-1] == str(folder / "initial")
    return folder


def words(folder: Path, out: str = "initial", **parts: Path) -> list[str]:
    """The command's arguments, with another folder for some parts."""
    paths = {part: str(parts.get(part, folder / part)) for part in ("llm", "vision", "autoencoder")}
    given = [word for part, path in paths.items() for word in (f"--{part}", path)]
    return ["import", str(folder / out), *given, "model.time_features=16"]


def settings(initial: Path) -> dict[str, str]:
    """Overrides of a recipe that starts from the import."""
    return {
        "init.from": str(initial),
        "model.decoder.rope_theta": str(public.THETA),
        "model.decoder.eps": "1.0e-5",
        "model.autoencoder.path": str(initial / "autoencoder"),
        "data.tokenizer": str(initial),
    }


def overrides(initial: Path, **changes: str) -> list[str]:
    return [f"{key}={value}" for key, value in {**settings(initial), **changes}.items()]


def started_from(initial: Path, **decoder: float) -> Recipe:
    """A stage 0 in memory that starts from an import; `decoder` overrides sizes."""
    sizes = {"num_layers": 2, "num_shared_layers": 1, "rope_theta": public.THETA, "eps": 1e-5, **decoder}
    changes = {f"model__decoder__{key}": value for key, value in sizes.items()}
    return tiny_recipe("stage0", init__from=str(initial), **changes)


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_the_first_stages_start_from_an_import(
    folder: Path, make_recipe: MakeRecipe, tmp_path: Path, stage: str
) -> None:
    (outcome,) = train(make_recipe(tmp_path, stage), "train.steps=2", *overrides(folder / "initial"))
    weights, before = stored(checkpoint(tmp_path / stage, 2)), load_file(folder / "initial" / export.WEIGHTS_FILE)
    assert f"loaded {len(before)} tensors" in outcome.err and "from the seed" not in outcome.err
    moved = {name for name, value in before.items() if not torch.equal(value, weights[f"model.{name}"])}
    assert any(name.startswith("und_adapter.") for name in moved)
    (outcome,) = run_ranks(1, command, ["inspect", str(tmp_path / stage)])
    assert "(imported," in outcome.out
    if stage == "stage0":
        assert all(name.startswith("und_adapter.") for name in moved)


def test_the_tiny_recipes_start_from_the_shipped_folders(tmp_path: Path) -> None:
    parts = {"llm": "qwen3", "vision": "siglip2", "autoencoder": "autoencoder"}
    folders = [word for part, name in parts.items() for word in (f"--{part}", str(ASSETS / name))]
    initial = tmp_path / "initial"
    (outcome,) = run_ranks(1, command, ["import", str(initial), *folders])
    assert outcome.value == 0, outcome.err
    start = [f"init.from={initial}", f"run.root={tmp_path}", "train.steps=1", "data.samples_per_step=12"]
    quick = ["validate.every=0", "train.sample_every=0", "engine.precision=fp32"]
    (outcome,) = train(ROOT / "recipes" / "tiny" / "stage0.yaml", *start, *quick)
    assert "from the seed" not in outcome.err
    language_model, encoder = (load_file(ASSETS / name / "model.safetensors") for name in ("qwen3", "siglip2"))
    weights = stored(checkpoint(tmp_path / "tiny-stage0", 1))
    assert torch.equal(weights["model.decoder.embed_tokens.weight"], language_model["model.embed_tokens.weight"])
    patches = next(value for name, value in encoder.items() if name.endswith("patch_embedding.weight"))
    assert torch.equal(weights["model.vision.patch_embedding.weight"], patches)


def test_two_ranks_read_their_slices_alone_and_hold_what_one_does(folder: Path) -> None:
    initial = folder / "initial"
    recipe = started_from(initial)
    (one,), two = run_ranks(1, loaded, recipe), run_ranks(2, loaded, recipe)
    file = load_file(initial / export.WEIGHTS_FILE)
    for outcome in (one, *two):
        assert outcome.value["weights"].keys() == file.keys()
        assert all(torch.equal(value, outcome.value["weights"][name]) for name, value in file.items())
        assert outcome.value["read"] == outcome.value["held"]
    total = sum(value.numel() for value in file.values())
    assert one.value["read"] == total == sum(outcome.value["read"] for outcome in two)
    assert all(0.4 * total < outcome.value["read"] < 0.6 * total for outcome in two)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.decoder.rope_theta": "1e6"}, "model.decoder.rope_theta is 50000.0 there and 1000000.0 in this recipe"),
        ({"model.decoder.eps": "1.0e-6"}, "set model.decoder.eps=1e-05"),
        ({"model.decoder.tied": "false"}, "set model.decoder.tied=True"),
        ({"model.decoder.num_shared_layers": "2"}, "model.decoder.num_shared_layers is 1 there and 2 in this recipe"),
        ({"model.vision.heads": "4"}, "set model.vision.heads=2"),
        ({"model.decoder.intermediate_size": "64"}, "has shape [48, 32] there and [64, 32] in this recipe"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_contradicts_the_import_is_refused(
    folder: Path, make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    (outcome,) = train(make_recipe(tmp_path, "stage0"), *overrides(folder / "initial", **changes), code=2)
    (line,) = outcome.error_lines
    assert said in line


def test_what_a_recipe_must_say_is_taken_in_any_order(folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    shared = {"model.decoder.shared": "[k_proj, q_proj]"}
    train(make_recipe(tmp_path, "stage0"), "train.steps=1", *overrides(folder / "initial", **shared))


def test_a_later_stage_does_not_start_from_an_import(folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (outcome,) = train(make_recipe(tmp_path, "stage2"), *overrides(folder / "initial"), code=2)
    (line,) = outcome.error_lines
    assert "holds imported weights, but stage2 starts from stage1" in line


def test_a_truncated_export_is_named(folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    initial = shutil.copytree(folder / "initial", tmp_path / "initial")
    file = initial / export.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])
    (outcome,) = train(make_recipe(tmp_path, "stage0"), *overrides(initial), code=2)
    (line,) = outcome.error_lines
    assert f"{file}: is not what was exported" in line


def test_bad_folders_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    public.llm(tmp_path / "llm", num_hidden_layers=2)
    public.change(tmp_path / "llm", lambda tensors: {**tensors, "model.norm.weight": torch.zeros(31)})
    outcome = run_command(*words(folder, "never", llm=tmp_path / "llm"), code=2)
    (line,) = outcome.error_lines
    assert line.startswith("emma-train import: ") and outcome.out == ""
    assert "model.norm.weight has shape [31], but its config.json makes it [32]" in line
    (empty := tmp_path / "empty").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / "llm" / name, empty / name)
    never = words(folder, "never")
    cases = {
        "empty: holds neither model.safetensors nor model.safetensors.index.json": words(folder, "never", llm=empty),
        "nowhere/config.json: cannot be read": words(folder, "never", vision=tmp_path / "nowhere"),
        "did you mean model.decoder.num_shared_layers?": [*never, "model.decoder.num_shared_layer=1"],
        "model.decoder.num_shared_layers is 9; it lies between 0 and num_layers (2)": [
            *never,
            "model.decoder.num_shared_layers=9",
        ],
        "llm: is not empty and not an export": words(folder, "llm"),
    }
    for said, argv in cases.items():
        (outcome,) = run_ranks(1, command, argv)
        (line,) = outcome.error_lines
        assert outcome.value == 2 and said in line
    assert not (folder / "never").exists()


@pytest.fixture(scope="module")
def larger(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM of 126 MB, whose import has 234 MB; its largest tensor has 17."""
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": public.THETA},
    )
    with torch.device("meta"):
        state = Qwen3ForCausalLM(config).state_dict()
    weights = {k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in state.items() if k != "lm_head.weight"}
    llm = tmp_path_factory.mktemp("larger")
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(llm)
    shutil.copyfile(folder / "llm" / "tokenizer.json", llm / "tokenizer.json")
    return llm


def test_neither_the_import_nor_a_start_from_it_holds_the_model(folder: Path, larger: Path) -> None:
    """Memory, not counting mapped files: one tensor while importing; on a rank its shard + the largest tensor."""
    argv = words(folder, "larger", llm=larger)
    (outcome,) = run_ranks(1, command_memory, words(folder, "warm"), argv)
    weights = load_file(folder / "larger" / export.WEIGHTS_FILE)
    largest, total = (f(value.nbytes for value in weights.values()) for f in (max, sum))
    assert largest == 32768 * 256 * 2 and total > 13 * largest
    assert outcome.value < largest + 8e6
    sizes = {
        "num_layers": 16,
        "num_shared_layers": 8,
        "hidden": 256,
        "intermediate_size": 4096,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
    }
    recipe = started_from(folder / "larger", vocab=32768, eps=1e-6, **sizes)
    ranks = run_ranks(4, start_memory, started_from(folder / "initial"), recipe)
    for peak, shard in (rank.value for rank in ranks):
        assert shard == pytest.approx(2 * total / 4, rel=0.02)  # float32 of what is stored in bfloat16
        assert peak < shard + 2 * largest
