"""What one stage hands to the next: loaded, cloned, new and dropped, each parameter once."""

import logging

import pytest
import torch

from emma_train.config.load import as_dict
from emma_train.config.schema import ModelConfig
from emma_train.errors import UserError
from emma_train.model.emma import Emma
from emma_train.stages.handoff import check_settings, plan_handoff, recipe_to_start
from tests.helpers import tiny_model, tiny_recipe

PLAIN = tiny_model()
EXPERT = tiny_model(vision={"stem_expert": True})
ROUTER = tiny_model(vision={"stem_expert": True, "router": True})


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Emma(config).named_parameters()}


def stored(config: ModelConfig, averaged: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint: weights, an optimizer, and averages of what has one of these prefixes."""
    model = shapes(config)
    return {
        **{f"model.{n}": s for n, s in model.items()},
        **{f"ema.{n}": s for n, s in model.items() if n.startswith(averaged)},
        "optimizer.state.und_adapter.fc1.weight.exp_avg": (1,),
    }


def test_the_same_model_is_loaded_whole() -> None:
    plan = plan_handoff(shapes(PLAIN), stored(PLAIN), PLAIN.vision, use_ema=True, source="runs/a")
    assert plan.loaded == {name: f"model.{name}" for name in shapes(PLAIN)}
    assert (plan.cloned, plan.initial, plan.dropped) == ({}, [], [])


def test_averaged_weights_are_preferred_where_they_are_and_wanted() -> None:
    source = stored(PLAIN, averaged=("decoder.",))
    plan = plan_handoff(shapes(PLAIN), source, PLAIN.vision, use_ema=True, source="a")
    for name, tensor in plan.loaded.items():
        assert tensor == ("ema." if name.startswith("decoder.") else "model.") + name
    num = sum(name.startswith("decoder.") for name in shapes(PLAIN))
    assert plan.lines() == [f"loaded {len(shapes(PLAIN))} tensors ({num} of them averaged weights)"]
    raw = plan_handoff(shapes(PLAIN), source, PLAIN.vision, use_ema=False, source="a")
    assert all(tensor.startswith("model.") for tensor in raw.loaded.values())


def test_the_stem_expert_starts_as_a_clone_and_the_router_from_the_seed() -> None:
    plan = plan_handoff(shapes(EXPERT), stored(PLAIN), EXPERT.vision, use_ema=True, source="a")
    new = set(shapes(EXPERT)) - set(shapes(PLAIN))
    assert set(plan.cloned) == new and plan.initial == [] and set(plan.loaded) == set(shapes(PLAIN))
    for name, origin in plan.cloned.items():
        assert origin == name.replace("vision.stem_layers.0.", "vision.layers.2.") and origin in plan.loaded
        assert shapes(EXPERT)[name] == shapes(EXPERT)[origin]
    plan = plan_handoff(shapes(ROUTER), stored(EXPERT), ROUTER.vision, use_ema=True, source="a")
    assert set(plan.initial) == set(shapes(ROUTER)) - set(shapes(EXPERT)) and plan.cloned == {}
    assert plan.lines()[1] == f"new, from the seed: {len(plan.initial)} tensors of router"


def test_a_trained_expert_is_loaded_not_cloned_again() -> None:
    plan = plan_handoff(shapes(ROUTER), stored(EXPERT), ROUTER.vision, use_ema=True, source="a")
    assert plan.loaded["vision.stem_layers.0.fc1.weight"] == "model.vision.stem_layers.0.fc1.weight"


def test_the_gen_adapter_may_start_as_a_copy_of_the_und_adapter() -> None:
    source = stored(PLAIN, averaged=("und_adapter.",))
    plan = plan_handoff(shapes(PLAIN), source, PLAIN.vision, use_ema=True, source="a", gen_adapter="und")
    layers = ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    assert plan.cloned == {f"gen_adapter.{layer}": f"und_adapter.{layer}" for layer in layers}
    assert all(plan.loaded[origin] == f"ema.{origin}" for origin in plan.cloned.values())
    assert {n for n in shapes(PLAIN) if n.startswith("gen_adapter.")} - set(plan.cloned) == {
        n for n in plan.loaded if n.startswith("gen_adapter.")
    }, "placeholder and time embedding have no counterpart"
    assert sorted([*plan.loaded, *plan.cloned]) == sorted(shapes(PLAIN)) and plan.initial == []
    assert plan.lines()[1] == "new, cloned: 6 tensors of gen_adapter"


def test_what_the_new_stage_lacks_is_dropped_and_said() -> None:
    plan = plan_handoff(shapes(PLAIN), stored(ROUTER), PLAIN.vision, use_ema=True, source="a")
    assert plan.dropped == sorted(set(shapes(ROUTER)) - set(shapes(PLAIN)))
    assert plan.lines()[-1] == f"dropped: {len(plan.dropped)} tensors of router, stem_expert"


@pytest.mark.parametrize(("old", "new"), [(PLAIN, EXPERT), (EXPERT, ROUTER), (ROUTER, PLAIN), (PLAIN, ROUTER)])
def test_every_parameter_has_one_origin(old: ModelConfig, new: ModelConfig) -> None:
    plan = plan_handoff(shapes(new), stored(old), new.vision, use_ema=True, source="a")
    assert sorted([*plan.loaded, *plan.cloned, *plan.initial]) == sorted(shapes(new))


def test_a_shape_that_differs_is_an_error_that_names_both() -> None:
    other = tiny_model(decoder={"intermediate_size": 64})
    with pytest.raises(
        UserError, match=r"init.from runs/a: decoder.* has shape \[64, 32\] there and \[48, 32\] in this recipe"
    ):
        plan_handoff(shapes(PLAIN), stored(other), PLAIN.vision, use_ema=True, source="runs/a")


@pytest.mark.parametrize(
    ("section", "key", "other"),
    [
        ("decoder", "rope_theta", 5e6),
        ("decoder", "shared", ["mlp"]),
        ("decoder", "tied", False),
        ("vision", "heads", 4),
    ],
)
def test_what_shapes_do_not_tell_must_agree(section: str, key: str, other: object) -> None:
    stored = as_dict(tiny_recipe())
    check_settings(stored, tiny_recipe("stage4_expert", init={"from": "a"}))
    stored["model"][section][key] = other
    with pytest.raises(UserError, match=rf"init.from a: model.{section}.{key} is .* set model.{section}.{key}="):
        check_settings(stored, tiny_recipe(init={"from": "a"}))


def test_the_scale_of_positions_must_agree() -> None:
    stored = as_dict(tiny_recipe())
    stored["model"]["position_scale"] = 1.0
    with pytest.raises(UserError, match=r"init.from a: model.position_scale is 1.0 there and 0.3 in this recipe"):
        check_settings(stored, tiny_recipe(init={"from": "a"}))


def test_the_order_of_what_is_shared_does_not_matter() -> None:
    stored = as_dict(tiny_recipe())
    stored["model"]["decoder"]["shared"].reverse()
    check_settings(stored, tiny_recipe())


def test_an_unset_setting_keeps_the_value_of_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    stored = as_dict(tiny_recipe(model__decoder__eps=1e-5, data__seed=9))
    with caplog.at_level(logging.INFO):
        recipe = recipe_to_start(tiny_recipe(init={"from": "a"}), stored)
    assert recipe.model.decoder.eps == 1e-5 and recipe.data.seed == 0
    (line,) = caplog.messages
    assert line == "init.from a: model.decoder.eps stays 1e-05; the recipe does not set it, and its default is 1e-06"
    check_settings(stored, recipe)
    set_by_recipe = tiny_recipe(init={"from": "a"}, model__decoder__eps=1e-6)
    assert recipe_to_start(set_by_recipe, stored) == set_by_recipe
    with pytest.raises(UserError, match="model.decoder.eps is 1e-05 there and 1e-06 in this recipe"):
        check_settings(stored, set_by_recipe)
