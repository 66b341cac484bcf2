"""The values that a field may have, by its facts (config/setting.py): choices, ranges, forms of names and paths."""

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from emma_train.config.setting import Facts, Setting, settings_of
from emma_train.errors import UserError

LONGEST_TEXT, LONGEST_NAME = 4096, 255
"""Bytes of a path, and of one folder or file in it, that Linux allows."""
BUCKET_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "hf")
"""URLs of these kinds begin with the name of a bucket or host."""
VARIABLE = re.compile(r"\$[A-Za-z_{(]")


def check_values(section: Any, source: str, prefix: str = "") -> None:
    """Raise UserError on the first value of a config section that the facts of its field do not allow.

    `source` names the recipe in the message.
    """
    for field in settings_of(type(section)):
        key, value = f"{prefix}{field.key}", getattr(section, field.name)
        if field.section is not None:
            check_values(value, source, f"{key}.")
        elif field.element is not None:
            for index, entry in enumerate(value):
                check_values(entry, source, f"{key}[{index}].")
        else:
            _check_value(key, value, field, source)


def allowed_range(facts: Facts) -> str:
    """The range of a number in words; empty if it has none."""
    low, high = facts.at_least, facts.at_most
    if low is not None and high is not None:
        return f"from {_bound(low)} to {_bound(high)}"
    parts = [
        f"{words} {_bound(bound)}"
        for words, bound in (
            ("at least", low),
            ("more than", facts.more_than),
            ("at most", high),
            ("less than", facts.less_than),
        )
        if bound is not None
    ]
    return " and ".join(parts)


def _check_value(key: str, value: Any, field: Setting, source: str) -> None:
    facts = field.facts
    if facts.length is not None and len(value) != facts.length:
        raise UserError(f"{source}: {key} is {value}; it must have {facts.length} entries")
    for entry_key, entry in _entries(key, value):
        if facts.choices and entry not in facts.choices:
            problem = f"{entry!r:.200}; it is one of {', '.join(map(str, facts.choices))}"
        elif isinstance(entry, str):
            problem = "" if facts.choices else _text_problem(entry, field)
        else:
            problem = "" if entry is None else _number_problem(entry, facts)
        if problem:
            raise UserError(f"{source}: {entry_key} is {problem}")


def _entries(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of each entry of a list or mapping; of any other value, that value itself."""
    if isinstance(value, list):
        yield from ((f"{key}[{index}]", entry) for index, entry in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", entry) for name, entry in value.items())
    else:
        yield key, value


def _number_problem(value: float, facts: Facts) -> str:
    """What is wrong with a number, or an empty text. NaN is outside of every range."""
    in_range = (
        (facts.at_least is None or value >= facts.at_least)
        and (facts.more_than is None or value > facts.more_than)
        and (facts.at_most is None or value <= facts.at_most)
        and (facts.less_than is None or value < facts.less_than)
    )
    return "" if in_range else f"{value}; it must be {allowed_range(facts)}"


def _text_problem(text: str, field: Setting) -> str:
    """What is wrong with a text, or an empty text. Only a field that is empty by default may be empty."""
    if text == "" and field.default == "":
        return ""
    if not text.strip():
        return "empty; give it a value" + (", or null" if field.default is None else "")
    if not text.isprintable():
        return f"{text!r}; it holds characters that cannot be printed"
    if len(os.fsencode(text)) > LONGEST_TEXT:
        return f"{text[:40]!r}... ({len(text)} characters); it may have {LONGEST_TEXT} bytes"
    return "" if field.facts.form == "text" else _path_problem(text, field.facts)


def _path_problem(text: str, facts: Facts) -> str:
    """What is wrong with the name of a folder or file, or an empty text."""
    is_url = "://" in text
    if long := [name for name in text.split("/") if len(os.fsencode(name)) > LONGEST_NAME]:
        return f"a path with the name {long[0][:40]!r}... in it; a name may have {LONGEST_NAME} bytes"
    if text.startswith("~"):
        return f"{text!r}; ~ is not expanded in recipes, so write the folder out: {os.path.expanduser(text)}"
    if VARIABLE.search(text):
        return f"{text!r}; shell variables are not expanded in recipes, so write their values out"
    if facts.form == "name":
        parts = PurePosixPath(text).parts
        if is_url or not parts or parts[0] == "/" or ".." in parts:
            return f"{text!r}; it must name a folder inside run.root, without a leading / and without .."
    if facts.form == "path" and is_url:
        return f"{text!r}; it must be a local path, not a URL"
    return bucket_problem(text) if facts.form == "url" else ""


def bucket_problem(url: str) -> str:
    """What is wrong with a URL without the bucket or host that its kind needs, or an empty text."""
    scheme, is_url, rest = url.partition("://")
    lacks_bucket = not rest.partition("/")[0] and (scheme in BUCKET_SCHEMES or not rest.strip("/"))
    return f"{url!r}; a URL needs a bucket or host: {scheme}://NAME/..." if is_url and lacks_bucket else ""


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
