"""Every number of a recipe has a range, every text a form; what is outside of them is told in one line."""

import copy
import math
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emma_train.config.check import check_recipe
from emma_train.config.load import load_recipe
from emma_train.config.schema import Recipe
from emma_train.config.setting import Setting, settings_of
from emma_train.config.values import allowed_range, check_values
from emma_train.errors import UserError
from tests.helpers import recipe_values, tiny_recipe, write_recipe


def every_field(schema: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """(key, field) of every field, those of list entries too."""
    for field in settings_of(schema):
        inner = field.section or field.element
        if inner is None:
            yield f"{prefix}{field.key}", field
        else:
            yield from every_field(inner, f"{prefix}{field.key}.")


def kinds(field: Setting) -> set[type]:
    """The types of a field's values, or of the entries of a list or mapping."""
    arguments = typing.get_args(field.kind)
    return {field.kind} if not arguments else {arguments[-1]} if typing.get_origin(field.kind) is dict else {*arguments}


NUMBERS = {key: field for key, field in every_field() if kinds(field) & {int, float} and not field.facts.choices}
SOURCES = [{"path": "a"}]
WITH_PHASE = tiny_recipe(
    data__phases=[{"name": "a", "steps": 1, "sources": SOURCES}],
    validate__sources=SOURCES,
    validate__questions=SOURCES,
    health__skip_steps=[{"first": 2, "last": 3}],
)


def message_of(section: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_values(section, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ") and "\n" not in message
    return message


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_lower_and_an_upper_bound(key: str) -> None:
    facts = NUMBERS[key].facts
    low = [bound for bound in (facts.at_least, facts.more_than) if bound is not None]
    high = [bound for bound in (facts.at_most, facts.less_than) if bound is not None]
    assert len(low) == len(high) == 1 and -math.inf < low[0] < high[0] < math.inf


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_outside_of_a_range_is_told_with_key_value_and_range(key: str) -> None:
    field = NUMBERS[key]
    facts, (*parents, name) = field.facts, key.split(".")
    low = facts.more_than if facts.at_least is None else facts.at_least - 1
    high = facts.less_than if facts.at_most is None else facts.at_most + 1
    inside = (facts.at_least or 0) + (0.5 if kinds(field) == {float} else 1)
    for value in (low, high, math.nan, math.inf, -math.inf):
        recipe = copy.deepcopy(WITH_PHASE)
        section: Any = recipe
        for parent in parents:
            section = getattr(section, parent)
            section = section[0] if isinstance(section, list) else section
        as_list, as_dict = isinstance(field.default, list), isinstance(field.default, dict)
        listed = [inside, value, *[inside] * ((facts.length or 2) - 2)]
        setattr(section, name, listed if as_list else {"vision": value} if as_dict else value)
        message = message_of(recipe)
        assert f"{name}[1] is {value}; " in message or f" is {value}; it must be {allowed_range(facts)}" in message


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.95, 0.99]])
def test_a_list_of_fixed_length_is_told(betas: list[float]) -> None:
    assert "optimizer.betas is [" in message_of(tiny_recipe(optimizer__betas=betas))


@pytest.mark.parametrize("decay", [1, 1.0, 1.5])
def test_averages_that_would_never_move_are_refused(decay: float) -> None:
    assert message_of(tiny_recipe(ema__decay=decay)).endswith("it must be at least 0 and less than 1")


WRONG_NAMES = [
    ("run.name", "", "empty"),
    ("run.name", " ", "empty"),
    ("run.name", ".", "must name a folder inside run.root"),
    ("run.name", "../../etc/x", "must name a folder inside run.root"),
    ("run.name", "a/../../b", "must name a folder inside run.root"),
    ("run.name", "/abs", "must name a folder inside run.root"),
    ("run.name", "s3://bucket/x", "must name a folder inside run.root"),
    ("run.name", "a\nb", "cannot be printed"),
    ("run.name", "x" * 256, "a name may have 255 bytes"),
    ("run.root", "", "empty"),
    ("run.root", "~/x", f"write the folder out: {Path.home()}/x"),
    ("run.root", "$HOME/x", "shell variables are not expanded"),
    ("run.root", "s3://bucket/runs", "must be a local path"),
    ("run.root", "a/" * 3000, "it may have 4096 bytes"),
    ("train.checkpoints", "s3://", "needs a bucket or host: s3://NAME/..."),
    ("train.checkpoints", "gs:///x", "needs a bucket or host: gs://NAME/..."),
    ("train.checkpoints", "s3://$BUCKET/x", "shell variables are not expanded"),
    ("train.sample_from", "~/held-out", "write the folder out"),
    ("init.from", "", "empty; give it a value, or null"),
    ("init.from", "s3://", "needs a bucket or host"),
    ("data.tokenizer", "", "empty"),
    ("data.sources", [{"path": ""}], "data.sources[0].path is empty"),
    ("data.sources", [{"path": "https:///x"}], "needs a bucket or host"),
    ("data.cache_dir", "~/cache", "write the folder out"),
    ("model.autoencoder.path", "", "empty"),
    ("tracker.project", "", "empty"),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG_NAMES)
def test_names_of_nothing_or_of_what_lies_elsewhere_are_refused(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_values(**{key.replace(".", "__"): value}))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {key}") and words in message and "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", "sweep/lr-3"),
        ("run.name", "..run"),
        ("run.root", "/tmp/a b"),
        ("run.root", "../runs"),
        ("train.checkpoints", ""),
        ("train.checkpoints", "s3://bucket/runs"),
        ("train.checkpoints", "file:///tmp/x"),
        ("init.from", "runs/stage0"),
        ("data.cache_dir", ""),
    ],
)
def test_usual_names_are_allowed(key: str, value: str) -> None:
    check_recipe(tiny_recipe(**{key.replace(".", "__"): value}), "test")


def test_the_words_for_a_range() -> None:
    facts = replace(NUMBERS["data.text_dropout"].facts, at_least=None, at_most=None)
    assert allowed_range(facts) == ""
    assert allowed_range(replace(facts, at_least=-1, less_than=0.5)) == "at least -1 and less than 0.5"
    assert (
        allowed_range(replace(facts, more_than=0, at_most=2**63 - 1)) == "more than 0 and at most 9223372036854775807"
    )
