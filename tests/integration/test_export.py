"""`emma-train export` writes the trained weights bit for bit, and transformers loads the Und branch."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from emma_train.export import hf_names as hf
from emma_train.export import qwen3
from emma_train.export.qwen3 import write_qwen3
from emma_train.export.stored_model import StoredModel
from emma_train.generate.load import load_model
from emma_train.sequence import layout
from emma_train.sequence.layout import TextSegment
from emma_train.sequence.pack import Sample, pack
from emma_train.storage.safetensors_io import Tensors
from tests import public
from tests.distributed.ranks import command, command_memory, loaded, write_checkpoint
from tests.distributed.spawn import run_ranks
from tests.helpers import DECODER, VOCAB, recipe_values, tiny_recipe, tokenizer, write_export, write_recipe
from tests.runs import checkpoint, stored, train

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: three steps of stage 1 on two processes, with averages."""
    root = tmp_path_factory.mktemp("export")
    settings = {"run__root": str(root), "run__name": "run", "train__steps": STEPS, "data__slots": 2}
    settings |= {"ema__decay": 0.5, "flow__shift": 3.0, "model__decoder__tied": False}
    train(write_recipe(root / "recipe.yaml", recipe_values("stage1", **settings)), processes=2)
    return root / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The run folder as an export."""
    return exported_to(run.parent / "exported", run)


def exported_to(out: Path, source: Path, *options: str) -> Path:
    (outcome,) = run_ranks(1, command, ["export", str(source), str(out), *options])
    assert outcome.value == 0, outcome.err
    assert outcome.out.splitlines()[-1] == str(out)
    return out


def refused(*argv: str) -> str:
    """The last line of a command that ends with exit code 2."""
    (outcome,) = run_ranks(1, command, list(argv))
    assert outcome.value == 2
    return outcome.error_lines[-1]


def weights_of(run: Path, kind: str) -> dict[str, Tensor]:
    state = stored(checkpoint(run, STEPS))
    return {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


def test_an_export_is_the_checkpoint_to_the_last_bit(run: Path, exported: Path, tmp_path: Path) -> None:
    weights, averages = weights_of(run, "model"), weights_of(run, "ema")
    assert not same(weights, averages)
    assert same(load_file(exported / "model.safetensors"), averages)
    assert same(load_file(exported_to(tmp_path / "raw", run, "--no-ema") / "model.safetensors"), weights)
    again = exported_to(tmp_path / "again", exported)
    for file in exported.rglob("*"):
        assert file.is_dir() or (again / file.relative_to(exported)).read_bytes() == file.read_bytes(), file
    assert sorted(p.name for p in exported.iterdir()) == [
        "autoencoder",
        "generation.json",
        "meta.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
    ]


def test_weights_are_rounded_to_bf16_where_asked(run: Path, tmp_path: Path) -> None:
    averages = weights_of(run, "ema")
    half = exported_to(tmp_path / "half", run, "--precision", "bf16")
    rounded = {name: value.to(torch.bfloat16) for name, value in averages.items()}
    assert same(load_file(half / "model.safetensors"), rounded)
    model, _, _ = load_model(half, torch.device("cpu"), use_ema=True)
    assert same({name: p.detach() for name, p in model.named_parameters()}, {n: v.float() for n, v in rounded.items()})


@pytest.mark.parametrize("size", [1, 2])
def test_the_next_stage_starts_from_either_with_the_same_bits(run: Path, exported: Path, size: int) -> None:
    averages = weights_of(run, "ema")
    for source in (run, exported):
        recipe = tiny_recipe("stage2", init__from=str(source), model__decoder__tied=False)
        for outcome in run_ranks(size, loaded, recipe):
            assert same(outcome.value["weights"], averages)


def test_what_is_loaded_to_generate_is_the_checkpoint_to_the_last_bit(run: Path, exported: Path) -> None:
    averages = weights_of(run, "ema")
    for source in (run, exported):
        model, recipe, meta = load_model(source, torch.device("cpu"), use_ema=True)
        assert same({name: p.detach() for name, p in model.named_parameters()}, averages)
        assert (meta["stage"], meta["step"], recipe.flow.shift) == ("stage1", STEPS, 3.0)
        half, _, _ = load_model(source, torch.device("cpu"), use_ema=True, dtype=torch.bfloat16)
        for name, value in model.named_parameters():
            assert torch.equal(half.get_parameter(name), value.to(torch.bfloat16)), name
    raw, _, _ = load_model(run, torch.device("cpu"), use_ema=False)
    assert same({name: p.detach() for name, p in raw.named_parameters()}, weights_of(run, "model"))


# Generation settings


def drawn(out: Path, model: Path, *options: str) -> bytes:
    words = ["generate", str(model), "--task", "t2i", "--prompt", "a red fish", "--size", "32", "32", "--out", str(out)]
    (outcome,) = run_ranks(1, command, [*words, *options])
    assert outcome.value == 0, outcome.err
    return (out / "t2i-0000.png").read_bytes()


def test_a_question_needs_no_image_and_an_edit_does(exported: Path, tmp_path: Path) -> None:
    words = ["generate", str(exported), "--prompt", "Two and two?", "--max-tokens", "3"]
    (outcome,) = run_ranks(1, command, [*words, "--task", "i2t"])
    assert outcome.value == 0, outcome.err
    assert "--task it2i needs an image: --image FILE" in refused(*words, "--task", "it2i")
    marked = refused("generate", str(exported), "--task", "i2t", "--prompt", "Is <image> a cat?")
    assert "1 <image> in the user turns for 0 images" in marked


def test_generate_follows_the_settings_of_an_export_unless_told_otherwise(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    text = (exported / "generation.json").read_text()
    assert json.loads(text) == {
        "flow": {
            "steps": 30,
            "text_guidance": 2.5,
            "image_guidance": 2.0,
            "shift": 3.0,
            "solver": "euler",
            "guidance_from": 0.0,
            "guidance_to": 1.0,
            "guidance_renorm": False,
        },
        "text": {"max_tokens": 64, "temperature": 0.0},
    }
    plain = drawn(tmp_path, exported)
    assert plain == drawn(tmp_path, run)
    other = ["--steps", "3", "--text-guidance", "9.0", "--shift", "1.0", "--solver", "heun"]
    changed = drawn(tmp_path, exported, *other)
    values = json.loads(text)
    values["flow"] |= {"steps": 3, "text_guidance": 9, "shift": 1.0, "solver": "heun"}
    try:
        (exported / "generation.json").write_text(json.dumps(values))
        assert drawn(tmp_path, exported) == changed != plain
        back = ["--steps", "30", "--text-guidance", "2.5", "--shift", "3.0", "--solver", "euler"]
        assert drawn(tmp_path, exported, *back) == plain
        assert json.loads((exported_to(tmp_path / "again", exported) / "generation.json").read_text()) == values
        for wrong, said in (
            ({"flow": {"stepps": 3}}, "flow.stepps: unknown key; did you mean steps?"),
            ({"flow": {"steps": 2.5}}, "flow.steps is 2.5; it is of type int"),
            ({"flow": {"solver": "midpoint"}}, "flow.solver is 'midpoint'; it is one of euler, heun"),
            ({"text": {"temperature": -1.0}}, "text.temperature is -1.0; it is a number from 0 to 1000"),
            ({"flows": {}}, "unknown section flows; it has flow and text"),
        ):
            (exported / "generation.json").write_text(json.dumps(wrong))
            line = refused("generate", str(exported), "--task", "t2i", "--prompt", "x")
            assert said in line and str(exported / "generation.json") in line
    finally:
        (exported / "generation.json").write_text(text)
    said = refused("generate", str(exported), "--task", "t2i", "--prompt", "x", "--shift", "0")
    assert "--shift is 0.0; it must be more than 0" in said


# Qwen3


@torch.no_grad()
def text_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of a text without any image, by our model."""
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    model, _, _ = load_model(folder, torch.device("cpu"), use_ema=True)
    words = [TextSegment((int(ids[0]),)), TextSegment(tuple(int(i) for i in ids[1:]), supervised=True)]
    out = model(pack([Sample("x", "i2t", words, {})]), torch.zeros(0, 32), torch.zeros(0))
    assert out.logits is not None
    return ids, out.logits


def as_transformers_loads_it(folder: Path) -> Any:
    model, loading_info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: value for key, value in loading_info.items() if value}
    assert wrong == {} and type(model).__name__ == "Qwen3ForCausalLM"
    return model.eval()


SHARED = {
    "default": ["q_proj", "k_proj"],
    "everything": ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "input_norm", "mlp_norm", "norm"],
    "nothing": [],
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_und_part_is_a_qwen3_that_answers_alike(tmp_path: Path, tied: bool, shared: str) -> None:
    changes = {"model__decoder__tied": tied, "model__decoder__shared": SHARED[shared]}
    changes |= {"model__decoder__rope_theta": 5e4, "model__decoder__eps": 1e-5}
    write_export(tmp_path / "emma", tiny_recipe("stage1", **changes))
    model = as_transformers_loads_it(exported_to(tmp_path / "qwen3", tmp_path / "emma", "--as", "qwen3"))
    ids, ours = text_logits(tmp_path / "emma")
    theirs = model(ids[None]).logits[0, :-1]
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings == tied
    assert ours.std() > 0.5 and float((ours - theirs).abs().max()) <= 1e-5
    config = hf.decoder_config(json.loads((tmp_path / "qwen3" / "config.json").read_text()), "config")
    assert (config.tied, config.rope_theta, config.eps, config.hidden) == (tied, 5e4, 1e-5, DECODER["hidden"])


def test_a_trained_checkpoint_becomes_a_qwen3_in_one_file_or_in_many(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = exported_to(tmp_path / "whole", run, "--as", "qwen3")
    assert sorted(p.name for p in single.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    monkeypatch.setattr(qwen3, "FILE_BYTES", 1e5)
    write_qwen3(tmp_path / "many", StoredModel(run))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) >= 3 and {p.name for p in files} == set(index["weight_map"].values())
    assert all(re.fullmatch(rf"model-0000\d-of-0000{len(files)}\.safetensors", p.name) for p in files)
    one, many = Tensors(single), Tensors(tmp_path / "many")
    assert one.specs == many.specs and all(torch.equal(one.read(name), many.read(name)) for name in one.specs)
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in one.specs.values())
    averages, loaded = weights_of(run, "ema"), as_transformers_loads_it(tmp_path / "many").state_dict()
    assert torch.equal(loaded["lm_head.weight"], averages["decoder.lm_head.weight"])
    up = "layers.3.mlp.up_proj.weight"
    assert torch.equal(loaded[f"model.{up}"], averages[f"decoder.{up.replace('mlp', 'und.mlp')}"])


def test_what_was_imported_comes_back_as_it_was(tmp_path: Path) -> None:
    original = public.llm(tmp_path / "llm").bfloat16()
    original.save_pretrained(tmp_path / "llm")
    public.vision(tmp_path / "vision")
    public.autoencoder(tmp_path / "autoencoder")
    (tmp_path / "llm" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    parts = [word for part in ("llm", "vision", "autoencoder") for word in (f"--{part}", str(tmp_path / part))]
    (outcome,) = run_ranks(1, command, ["import", str(tmp_path / "emma"), *parts])
    assert outcome.value == 0, outcome.err
    back = exported_to(tmp_path / "back", tmp_path / "emma", "--as", "qwen3")
    assert same(load_file(back / "model.safetensors"), load_file(tmp_path / "llm" / "model.safetensors"))
    assert as_transformers_loads_it(back).dtype == torch.bfloat16
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "llm" / name).read_bytes()
    one, other = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("llm", "back"))
    assert hf.decoder_config(one, "llm") == hf.decoder_config(other, "back")


def test_the_tokenizer_and_its_chat_template_are_those_of_training(run: Path, tmp_path: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(exported_to(tmp_path / "qwen3", run, "--as", "qwen3")), tokenizer()
    turns = [("user", "What is this?"), ("assistant", "a red fish"), ("user", "Is it  large?\n")]
    segments = layout.understanding(ours, [], turns) + layout.answer_opening(ours)
    laid_out = [i for s in segments if isinstance(s, TextSegment) for i in s.ids]
    messages = [{"role": role, "content": text} for role, text in turns]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(asked, add_special_tokens=False) == laid_out
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.im_end, ours.endoftext)
    values = json.loads((tmp_path / "qwen3" / "generation_config.json").read_text())
    assert values["eos_token_id"] == [ours.im_end, ours.endoftext]


def test_a_folder_that_holds_something_is_left_alone(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for format, out in (("emma", tmp_path / "mine"), ("qwen3", tmp_path / "mine"), ("qwen3", exported)):
        assert f"{out}: is not empty" in refused("export", str(run), str(out), "--as", format)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert "does not exist" in refused("export", str(tmp_path / "nowhere"), str(tmp_path / "out"))


def test_neither_export_holds_the_model(tmp_path: Path) -> None:
    """Memory without mapped files: a few copies of the largest tensor; the model is many times larger."""
    sizes = {
        "hidden": 256,
        "intermediate_size": 2048,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "vocab": 16384,
        "num_layers": 16,
    }
    changes = {f"model__decoder__{key}": value for key, value in {**sizes, "num_shared_layers": 8}.items()}
    recipe = tiny_recipe("stage1", **changes)
    (total,) = (outcome.value for outcome in run_ranks(1, write_checkpoint, tmp_path / "run", recipe))
    write_export(tmp_path / "small", tiny_recipe("stage1"))
    largest = 16384 * 256 * 4
    assert total > 12 * largest
    for format in ("emma", "qwen3"):
        warm_up = ["export", str(tmp_path / "small"), str(tmp_path / f"warm-{format}"), "--as", format]
        argv = ["export", str(tmp_path / "run"), str(tmp_path / format), "--as", format]
        (outcome,) = run_ranks(1, command_memory, warm_up, argv)
        print(f"{format}: {outcome.value / 1e6:.1f} MB for {total / 1e6:.1f}, the largest tensor {largest / 1e6:.1f}")
        assert outcome.value < 3 * largest
