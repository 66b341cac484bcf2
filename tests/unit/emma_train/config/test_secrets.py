"""Passwords and access tokens of URLs stay out of all that is written or shown."""

import logging

import pytest

from emma_train.config.load import config_hash, to_stored, to_yaml
from emma_train.config.secrets import without_secrets
from emma_train.monitor.console import PublicFormatter
from emma_train.training.resume_rule import contradictions
from tests.helpers import tiny_recipe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SECRET@bucket/a/b", "s3://bucket/a/b"),
        ("https://host:80/a?sig=SECRET&x=1", "https://host:80/a"),
        ("data.sources=[{path: 'https://u:p@h/a?t=SECRET'}]", "data.sources=[{path: 'https://h/a'}]"),
        ("[{path: https://h/a?t=SECRET, weight: 1}]", "[{path: https://h/a, weight: 1}]"),
        ("two: s3://K:S@a/b and gs://c@d/e", "two: s3://a/b and gs://d/e"),
        ("a@b.c asks why? /data/x?y=1", "a@b.c asks why? /data/x?y=1"),
        ("file:///data/x", "file:///data/x"),
    ],
)
def test_urls_are_shown_without_what_gives_access(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_files_and_trackers_get_the_recipe_without_secrets() -> None:
    sources = [{"path": "s3://KEY:SECRET@bucket/data"}, {"path": "https://host/data?token=SECRET"}]
    recipe = tiny_recipe(data__sources=sources)
    assert recipe.data.sources[1].path.endswith("SECRET")
    assert "SECRET" not in to_yaml(recipe) and "SECRET" not in str(to_stored(recipe))
    assert "s3://bucket/data" in to_yaml(recipe)


def test_a_new_token_is_no_contradiction_and_no_other_config() -> None:
    old, new = (tiny_recipe(data__sources=[{"path": f"https://host/data?token={t}"}]) for t in ("OLD", "NEW"))
    assert contradictions(new, to_stored(old)) == {}
    assert config_hash(new) == config_hash(old)


def test_log_lines_are_shown_without_secrets() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "reads %s", ("https://u:p@host/a?t=SECRET",), None)
    assert PublicFormatter("%(message)s").format(record) == "reads https://host/a"
