"""Stored configs of older versions: old names, keys that they lack, and defaults that have changed since."""

from dataclasses import dataclass
from typing import Any

import pytest

from emma_train.config.load import as_dict
from emma_train.config.schema import Recipe
from emma_train.config.setting import Setting, section, setting
from emma_train.config.stored import complete, from_stored, keep_stored, without_old_values
from emma_train.errors import UserError
from tests.helpers import recipe_values, tiny_recipe


@dataclass
class Inner:
    width: int = setting(3)
    added: str = setting("new", absent="old")


@dataclass
class Outer:
    inner: Inner = section(Inner)
    late: Inner = section(Inner)
    entries: list[Inner] = setting([])
    scale: float = setting(2.0, absent=1.0)
    same: int = setting(7)


def always(key: str, field: Setting) -> bool:
    return True


def test_a_key_that_is_lacking_counts_as_the_old_behaviour() -> None:
    stored = {"inner": {"width": 5}, "entries": [{"width": 1}, {"width": 2, "added": "new"}]}
    assert complete(stored, "checkpoint", Outer) == {
        "inner": {"width": 5, "added": "old"},
        "late": {"width": 3, "added": "old"},
        "entries": [{"width": 1, "added": "old"}, {"width": 2, "added": "new"}],
        "scale": 1.0,
        "same": 7,
    }
    assert stored == {"inner": {"width": 5}, "entries": [{"width": 1}, {"width": 2, "added": "new"}]}


def test_a_complete_config_and_unknown_keys_stay_as_they_are() -> None:
    values = as_dict(tiny_recipe())
    assert complete(values, "checkpoint") == values
    assert complete({**values, "later": {"a": 1}}, "checkpoint")["later"] == {"a": 1}


def test_a_config_without_its_old_values_means_the_same() -> None:
    stored = {"inner": {"width": 5}, "entries": [{}, {"width": 2, "added": "new"}]}
    assert without_old_values(complete(stored, "checkpoint", Outer), Outer) == stored
    values = as_dict(tiny_recipe())
    shorter = without_old_values(values)
    assert complete(shorter, "checkpoint") == values
    assert "fp8" not in shorter["engine"]  # added later: `off` is what a recipe without it means


def test_old_names_of_a_checkpoint_are_current_ones_in_its_recipe() -> None:
    values = as_dict(tiny_recipe())
    decoder, vision, optimizer, train = (
        values["model"]["decoder"],
        values["model"]["vision"],
        values["optimizer"],
        values["train"],
    )
    for section_values, old, new in (
        (decoder, "layers", "num_layers"),
        (decoder, "shallow", "num_shared_layers"),
        (decoder, "mlp", "intermediate_size"),
        (vision, "layers", "num_layers"),
        (vision, "mlp", "intermediate_size"),
        (vision, "table", "position_grid"),
        (optimizer, "clip", "max_grad_norm"),
        (train, "sample_num", "num_samples"),
    ):
        section_values[old] = section_values.pop(new)
    assert from_stored(values, "checkpoint") == tiny_recipe()
    assert as_dict(from_stored(values, "checkpoint")) == as_dict(tiny_recipe())


def with_stored(recipe: Recipe, **dotted: Any) -> tuple[Recipe, list[str]]:
    return keep_stored(recipe, as_dict(tiny_recipe(**dotted)), "checkpoint", always)


def test_an_unset_field_keeps_the_stored_value_over_the_default() -> None:
    recipe = tiny_recipe(data__text_dropout=0.1)
    kept, lines = with_stored(recipe, data__text_dropout=0.2, data__reference_dropout=0.3, optimizer__betas=[0.9, 0.95])
    assert (kept.data.text_dropout, kept.data.reference_dropout, kept.optimizer.betas) == (0.1, 0.3, [0.9, 0.95])
    assert lines == [
        "data.reference_dropout stays 0.3; the recipe does not set it, and its default is 0.1",
        "optimizer.betas stays [0.9, 0.95]; the recipe does not set it, and its default is [0.9, 0.999]",
    ]
    assert kept.set_keys == recipe.set_keys and recipe.data.reference_dropout == 0.1


def test_a_recipe_that_agrees_is_returned_as_it_is() -> None:
    recipe = tiny_recipe()
    kept, lines = with_stored(recipe)
    assert kept is recipe and lines == []


def test_the_rule_decides_which_fields_keep_the_stored_value() -> None:
    stored = as_dict(tiny_recipe(engine__prefetch=3, data__seed=2))
    kept, lines = keep_stored(tiny_recipe(), stored, "checkpoint", lambda key, field: field.rule == "free")
    assert (kept.engine.prefetch, kept.data.seed, len(lines)) == (3, 0, 1)


def test_a_mix_is_set_as_a_whole() -> None:
    kept, lines = with_stored(tiny_recipe(mix={"i2t": 1}), mix={"i2t": 1, "t2i": 1})
    assert kept.mix.t2i == 0 and lines == []


def test_fields_of_a_list_entry_are_kept_one_by_one() -> None:
    stored = [{"path": "a", "exclude_tags": ["stem"]}, {"path": "b"}]
    kept, lines = with_stored(tiny_recipe(data__sources=[{"path": "a"}, {"path": "c"}]), data__sources=stored)
    assert [(s.path, s.exclude_tags) for s in kept.data.sources] == [("a", ["stem"]), ("c", [])]
    assert [line.partition(" ")[0] for line in lines] == ["data.sources[0].exclude_tags"]


def test_a_value_set_in_code_counts_as_set() -> None:
    recipe = tiny_recipe()
    recipe.data.seed = 4
    kept, _ = with_stored(recipe, data__seed=2)
    assert kept.data.seed == 4


def test_both_names_with_two_values_are_an_error() -> None:
    values = recipe_values()
    values["optimizer"] |= {"clip": 0.5, "max_grad_norm": 1.0}
    with pytest.raises(
        UserError, match="checkpoint: optimizer.clip is now called optimizer.max_grad_norm; both are set"
    ):
        from_stored(values, "checkpoint")
