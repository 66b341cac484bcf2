"""Every contradiction that a recipe can hold, once; each names its fields."""

from typing import Any

import pytest

from emma_train.config.check import check_recipe, check_world, validated_tasks
from emma_train.config.mix import phases, samples_per_task
from emma_train.config.schema import MixConfig, Recipe
from emma_train.config.setting import all_settings
from emma_train.errors import UserError
from tests.helpers import tiny_recipe

DEEPSPEED = {"engine__kind": "deepspeed"}
HELD_OUT = [{"path": "held_out"}]
VALIDATED = {"validate__every": 2, "validate__sources": HELD_OUT, "train__keep_best": "val/loss"}
WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *[
        ({key.replace(".", "__"): "odd"}, (key, "'odd'", field.facts.choices[-1]))
        for key, field in all_settings(Recipe)
        if field.kind is str and field.facts.choices
    ],
    ({"mix": {}}, ("at least one share above 0",)),
    ({"data__samples_per_step": 13}, ("data.samples_per_step is 13", "i2t=1, t2i=1, it2i=1", "12 would do")),
    ({"data__samples_per_step": 2, "data__slots": 1}, ("cannot divide exactly", "3 would do")),
    ({"data__samples_per_step": 9}, ("3 i2t samples", "4 slots", "data.slots")),
    ({"data__sources": []}, ("data.sources is empty",)),
    (
        {"data__phases": [{"name": "b", "steps": 1, "mix": {"i2t": 5}}]},
        ("mix of phase b", "(i2t=5)", "10 would do"),
    ),
    ({"model__autoencoder__pixels": 16}, ("model.autoencoder.pixels is 16", "32")),
    ({"model__fusion": "latent", "mix__recon": 1}, ("model.fusion is latent", "recon", "set mix.recon=0")),
    (
        {"model__fusion": "latent", "model__vision__router": True},
        ("model.fusion is latent", "router", "set model.fusion=channel"),
    ),
    (
        {"model__adapters": "one", "init__gen_adapter": "und"},
        ("init.gen_adapter is und", "model.adapters is one", "set init.gen_adapter=random"),
    ),
    ({"model__decoder__num_shared_layers": 5}, ("model.decoder.num_shared_layers is 5", "num_layers (4)")),
    ({"model__decoder__shared": ["q_proj", "q_norm"]}, ("'q_norm'", "k_proj")),
    ({"model__decoder__kv_heads": 3}, ("heads (4)", "kv_heads (3)")),
    ({"model__decoder__head_dim": 7}, ("head_dim is 7", "even")),
    ({"data__caption_questions": []}, ("data.caption_questions is empty",)),
    ({"data__caption_questions": ["Why?", " "]}, ("data.caption_questions[1] is empty",)),
    ({"model__vision__feature_layer": -3}, ("expert_layers is 1", "has 1 layers")),
    ({"model__vision__expert_layers": 3}, ("expert_layers is 3",)),
    ({"model__time_features": 15}, ("model.time_features is 15", "even")),
    ({"model__vision__heads": 5}, ("model.vision.hidden (32)", "heads (5)")),
    ({"data__und": {"side": 65}}, ("data.und.side is 65", "multiple of 32")),
    ({"data__gen": {"side": 48}}, ("data.gen.side is 48", "multiple of 32")),
    ({"engine__zero_stage": 4}, ("engine.zero_stage is 4", "1, 2, 3")),
    ({"engine__debug_lockstep": True, "engine__compile": True}, ("engine.debug_lockstep", "engine.compile=false")),
    ({"engine__sequence_parallel": 3}, ("engine.sequence_parallel is 3", "heads (4)", "kv_heads (2)")),
    ({"engine__sequence_parallel": 2, "engine__compile": True}, ("engine.compile", "engine.sequence_parallel")),
    ({"train__local_every": 1}, ("train.local_every is 1", "train.local_folder names no folder")),
    (
        {"train__local_every": 2, "train__save_every": 2, "train__local_folder": "a"},
        ("train.local_every is 2", "below train.save_every (2)"),
    ),
    ({"validate__every": 2}, ("validate.every is 2", "validate.sources=")),
    ({"validate__every": -1}, ("validate.every is -1",)),
    ({"validate__num_samples": 0}, ("validate.num_samples is 0",)),
    ({"validate__sources": [{"path": "a", "tasks": ["video"]}]}, ("validate.sources[0].tasks[0] is 'video'",)),
    ({"validate__guard__max_drop": 0}, ("validate.guard.max_drop is 0", "more than 0")),
    (
        {**VALIDATED, "validate__every": 0},
        ("train.keep_best is val/loss", "train.save_every (2)", "validate.every (0)"),
    ),
    ({**VALIDATED, "validate__every": 4}, ("train.keep_best is val/loss", "multiple of validate.every (4)")),
    ({**VALIDATED, "train__keep_best": "val/ema/loss"}, ("ema.decay is 0", "take val/loss")),
    ({**VALIDATED, "train__keep_best": "val/answers"}, ("val/answers", "validate.questions names no folder")),
    ({**VALIDATED, "validate__questions": HELD_OUT, "validate__sources": []}, ("validate.sources names no folder",)),
    ({**VALIDATED, "train__keep_best": "val/loss/recon"}, ("recon is not in the mix",)),
    ({"engine__fp8": "rowwise"}, ("engine.fp8 is rowwise", "engine.precision=bf16", "engine.fp8=off")),
    (
        {**DEEPSPEED, "engine__precision": "bf16", "engine__fp8": "tensorwise"},
        ("engine.fp8 is tensorwise", "engine.kind=fsdp", "not deepspeed and bf16"),
    ),
    ({"engine__fp8": "blockwise"}, ("engine.fp8 is 'blockwise'", "off, tensorwise, rowwise")),
    ({**DEEPSPEED, "engine__replicate": 2}, ("engine.replicate is 2", "engine.kind=deepspeed")),
    ({**DEEPSPEED, "engine__frozen": "replicated"}, ("engine.frozen is replicated", "engine.kind=deepspeed")),
    ({**DEEPSPEED, "engine__compile": True, "engine__zero_stage": 3}, ("engine.compile", "ZeRO-3", "zero_stage=2")),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_contradiction_is_one_line_that_names_its_fields(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(tiny_recipe(**changes), "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2", "stage3", "stage4_expert", "stage4_router"])
def test_the_recipes_of_these_tests_are_right(stage: str) -> None:
    check_recipe(tiny_recipe(stage), "test")


def test_the_samples_of_a_step_keep_the_ratio_exactly() -> None:
    for mix, total in (
        (MixConfig(1, 1, 1), 12),
        (MixConfig(2, 3, 0), 50),
        (MixConfig(1, 0, 0), 7),
        (MixConfig(8, 7, 1), 192),
    ):
        counts = samples_per_task(mix, total)
        shares = {task: getattr(mix, task) for task in ("i2t", "t2i", "it2i")}
        assert sum(counts.values()) == total and set(counts) == {t for t, s in shares.items() if s}
        assert all(counts[t] * sum(shares.values()) == total * shares[t] for t in counts)


def test_a_world_that_cannot_share_the_slots_is_told_which_could() -> None:
    for world in (1, 2, 3, 4, 6, 12):
        check_world(12, world)
    for world in (5, 7, 8, 24):
        with pytest.raises(
            UserError, match=f"data.slots is 12, which {world} processes .* fits 1, 2, 3, 4, 6, 12 processes"
        ):
            check_world(12, world)


def test_a_stage_without_phases_is_one_phase_and_a_phase_inherits_sources() -> None:
    (only,) = phases(tiny_recipe())
    assert (only.name, only.steps, only.mix) == ("stage1", 4, MixConfig(1, 1, 1))
    other = [{"path": "own"}]
    listed = phases(tiny_recipe(data__phases=[{"name": "a", "steps": 2}, {"name": "b", "steps": 3, "sources": other}]))
    assert [(p.name, p.steps) for p in listed] == [("a", 2), ("b", 3)]
    assert listed[0].sources == only.sources and [s.path for s in listed[1].sources] == ["own"]


def test_validation_on_training_data_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    trained = tiny_recipe().data.sources[0].path
    check_recipe(tiny_recipe(validate__every=2, validate__sources=HELD_OUT), "test")
    assert caplog.text == ""
    check_recipe(tiny_recipe(validate__every=2, validate__sources=[*HELD_OUT, {"path": trained}]), "test")
    assert f"validate.sources[1] {trained} is trained on as well" in caplog.text


def test_understanding_is_validated_even_where_it_is_not_trained() -> None:
    assert validated_tasks(tiny_recipe(mix={"t2i": 1})) == ["i2t", "t2i"]
    phases_of_all = [{"name": task, "steps": 1, "mix": {task: 1}} for task in ("t2i", "it2i", "recon")]
    recipe = tiny_recipe(data__phases=phases_of_all, data__samples_per_step=0)
    assert validated_tasks(recipe) == ["i2t", "t2i", "it2i", "recon"]
