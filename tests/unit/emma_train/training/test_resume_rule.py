"""The resume rule: what is fixed, what is free, what an older checkpoint means, and resume.allow."""

import logging
import re
from typing import Any

import pytest

from emma_train.config.load import as_dict
from emma_train.config.schema import Recipe
from emma_train.config.setting import all_settings
from emma_train.errors import UserError
from emma_train.training.resume_rule import check_resume, contradictions, recipe_to_resume
from tests.helpers import tiny_recipe

FREE_OF_E0297DE = (
    "run.",
    "train.",
    "tracker.",
    "engine.",
    "attention.",
    "init.",
    "ema.device",
    "resume.",
    "generation.",
    "validate.",
    "health.",
    "profile.",
    "data.tokenizer",
    "model.autoencoder.path",
    "data.workers",
    "data.prefetch",
    "data.max_bad_samples",
    "data.max_bad_share",
    "data.cache_",
    "data.read_",
)


def test_what_is_free_is_what_has_been_free() -> None:
    for key, field in all_settings(Recipe):
        assert (field.rule == "free") == key.startswith(FREE_OF_E0297DE), key


def stored(**dotted: Any) -> dict[str, Any]:
    return as_dict(tiny_recipe(**dotted))


def lines(recipe: Recipe, theirs: dict[str, Any]) -> list[str]:
    return list(contradictions(recipe, theirs).values())


def test_free_fields_may_differ_and_fixed_ones_may_not() -> None:
    assert lines(tiny_recipe(), stored(engine__kind="deepspeed", train__steps=9, data__workers=3)) == []
    assert lines(tiny_recipe(), stored(optimizer__lr=2e-3, data__seed=1)) == [
        "data.seed is 0 in the recipe and 1 in the checkpoint",
        "optimizer.lr is 0.001 in the recipe and 0.002 in the checkpoint",
    ]


def test_a_moved_source_is_no_contradiction_and_another_list_is_one() -> None:
    def recipe(*sources: dict[str, Any], phases: Any = ()) -> Recipe:
        return tiny_recipe(data__sources=list(sources), data__phases=list(phases))

    one, other = {"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}
    assert lines(recipe(one), as_dict(recipe(other))) == []
    assert lines(recipe(one), as_dict(recipe({**one, "require_tags": ["stem"]}))) == [
        "data.sources[0].require_tags is [] in the recipe and ['stem'] in the checkpoint"
    ]
    assert lines(recipe(one, other), as_dict(recipe({**one, "weight": 2.0}))) == [
        "data.sources is a list of 2 in the recipe and a list of 1 in the checkpoint"
    ]
    phases = [{"name": name, "steps": 3, "mix": {"i2t": 1}, "sources": [one]} for name in "ab"]
    longer = [{**phases[0], "steps": 4, "sources": [other]}, phases[1]]
    assert lines(recipe(phases=longer), as_dict(recipe(phases=phases))) == [
        "data.phases[0].steps is 4 in the recipe and 3 in the checkpoint"
    ]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("data.source", "data.sources"),
        ("mixx", "mix"),
        ("*", ""),
    ],
)
def test_a_key_of_resume_allow_that_does_not_exist_is_refused(name: str, nearest: str) -> None:
    recipe = tiny_recipe(resume__allow=[name])
    with pytest.raises(UserError, match=rf"resume\.allow names '{re.escape(name)}', .* did you mean {nearest}"):
        recipe_to_resume(recipe, stored(), "step-3")


@pytest.mark.parametrize("name", ["mix", "mix.t2i", "data.sources[0].weight", "data.phases", "optimizer.clip"])
def test_sections_entries_and_old_names_may_be_allowed(name: str) -> None:
    recipe_to_resume(tiny_recipe(resume__allow=[name]), stored(), "step-3")


def test_what_is_accepted_and_what_moves_the_rate_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_recipe(optimizer__lr=2e-3, train__steps=200, resume__allow=["optimizer.lr"])
    recipe.schedule.kind, recipe.schedule.warmup_steps = "cosine", 0
    theirs = as_dict(recipe)
    theirs["optimizer"]["lr"], theirs["train"]["steps"] = 1e-3, 100
    with caplog.at_level(logging.INFO):
        recipe_to_resume(recipe, theirs, "step-99", step=99)
    assert caplog.messages == [
        "step-99: accepted: optimizer.lr is 0.002 in the recipe and 0.001 in the checkpoint",
        "step-99: train.steps is 200 in the recipe and 100 in the checkpoint: the cosine now ends at step 200, so the "
        "learning rate of step 100 is 0.001, not 0",
    ]


def test_the_error_names_the_field_and_the_ways_out() -> None:
    with pytest.raises(UserError) as caught:
        check_resume(tiny_recipe(), stored(optimizer__lr=2e-3, data__seed=1), "step-3")
    assert str(caught.value) == (
        "step-3: data.seed is 0 in the recipe and 1 in the checkpoint, optimizer.lr is 0.001 in the recipe and 0.002 "
        "in the checkpoint; put them back, start another run.name with init.from, or accept with "
        "resume.allow=[data.seed,optimizer.lr]"
    )


@pytest.mark.parametrize("allow", ["optimizer.max_grad_norm", "optimizer.clip", "optimizer"])
def test_an_allowed_field_takes_the_recipes_value(allow: str) -> None:
    theirs = stored(optimizer__max_grad_norm=0.5)
    set_by_recipe = tiny_recipe(optimizer__max_grad_norm=1.0)
    assert contradictions(set_by_recipe, theirs)
    for recipe in (set_by_recipe, tiny_recipe()):
        recipe.resume.allow = [allow]
        assert recipe_to_resume(recipe, theirs, "step-3").optimizer.max_grad_norm == 1.0


def test_a_renamed_key_of_a_checkpoint_is_compared_and_named_by_its_current_name() -> None:
    theirs = stored()
    theirs["optimizer"]["clip"] = theirs["optimizer"].pop("max_grad_norm")
    assert lines(tiny_recipe(), theirs) == []
    theirs["optimizer"]["clip"] = 0.5
    assert lines(tiny_recipe(), theirs) == ["optimizer.max_grad_norm is 1.0 in the recipe and 0.5 in the checkpoint"]


def test_a_key_that_an_old_checkpoint_lacks_is_no_contradiction() -> None:
    theirs = stored()
    del theirs["data"]["shuffle_window"], theirs["data"]["gen"]["max_tokens"], theirs["flow"]
    del theirs["data"]["sources"][0]["weight"]
    assert lines(tiny_recipe(), theirs) == []
    assert lines(tiny_recipe(data__shuffle_window=5), theirs) == [
        "data.shuffle_window is 5 in the recipe and 262144 in the checkpoint"
    ]


def test_a_key_that_this_version_does_not_know_follows_its_section() -> None:
    theirs = stored()
    theirs["engine"]["gone"] = 1
    assert lines(tiny_recipe(), theirs) == []
    theirs["data"]["gone"] = 1
    assert lines(tiny_recipe(), theirs) == ["data.gone is None in the recipe and 1 in the checkpoint"]


def test_an_unset_field_keeps_the_checkpoints_value_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    theirs = stored(data__text_dropout=0.2, engine__prefetch=4)
    with caplog.at_level(logging.INFO):
        kept = recipe_to_resume(tiny_recipe(), theirs, "step-3")
    assert (kept.data.text_dropout, kept.engine.prefetch) == (0.2, 1)
    assert caplog.messages == [
        "step-3: data.text_dropout stays 0.2; the recipe does not set it, and its default is 0.1"
    ]
    with pytest.raises(UserError, match=r"data.text_dropout is 0.1 in the recipe and 0.2 in the checkpoint"):
        recipe_to_resume(tiny_recipe(data__text_dropout=0.1), theirs, "step-3")


def test_the_optimizer_never_changes_at_a_resume() -> None:
    """Its state would not fit, so resume.allow does not help. Checkpoints from before the field have AdamW."""
    stored = as_dict(tiny_recipe())
    del stored["optimizer"]["kind"], stored["optimizer"]["muon"]
    assert recipe_to_resume(tiny_recipe(), stored, "step-1").optimizer.kind == "adamw"
    for allow in ([], ["optimizer"], ["optimizer.kind"]):
        muon = tiny_recipe(optimizer__kind="muon", resume__allow=allow)
        with pytest.raises(UserError) as error:
            recipe_to_resume(muon, stored, "step-1")
        message = str(error.value)
        assert "optimizer.kind is 'muon' in the recipe and 'adamw' in the checkpoint" in message
        assert "init.from" in message and "resume.allow" not in message and "\n" not in message
    adamw = tiny_recipe(optimizer__kind="adamw")
    adamw.set_keys = frozenset({"optimizer.kind"})
    with pytest.raises(UserError, match="optimizer.kind is 'adamw' in the recipe and 'muon' in the checkpoint"):
        recipe_to_resume(adamw, as_dict(tiny_recipe(optimizer__kind="muon")), "step-1")
    assert recipe_to_resume(tiny_recipe(), as_dict(tiny_recipe(optimizer__kind="muon")), "s").optimizer.kind == "muon"
