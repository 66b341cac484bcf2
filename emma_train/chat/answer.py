"""Reads the JSON of an answer strictly: one object that fits the schema, or what is wrong with it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from emma_train.errors import UserError

NOT_JSON, WRONG_SCHEMA = "not_json", "wrong_schema"
"""Why an answer cannot be used: it is no JSON object; it does not fit the schema."""
_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*)\n\s*```\s*\Z", re.DOTALL)


class BadAnswer(Exception):
    """An answer that cannot be used. `failure` is one of the words above, the message says what is wrong."""

    def __init__(self, failure: str, message: str) -> None:
        super().__init__(message)
        self.failure = failure


def read_answer(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The object that an answer consists of. Raises BadAnswer.

    A block <think>...</think> before it and a Markdown code fence around it are allowed, any other text is not: an
    object that is picked out of a sentence may be an example or a quotation. Nothing is converted: "8" is no number.
    """
    text = _THINKING.sub("", text, count=1)
    fenced = _FENCED.match(text)
    try:
        value = json.loads(
            fenced.group(1) if fenced else text, object_pairs_hook=_distinct_keys, parse_constant=_no_constant
        )
    except RecursionError:
        raise BadAnswer(NOT_JSON, "it is nested too deeply") from None
    except ValueError as error:
        raise BadAnswer(NOT_JSON, str(error)) from None
    if not isinstance(value, dict):
        raise BadAnswer(NOT_JSON, f"it is no JSON object but {type(value).__name__}")
    if problem := _schema_problem(value, schema):
        raise BadAnswer(WRONG_SCHEMA, problem)
    return value


def _schema_problem(value: dict[str, Any], schema: Mapping[str, Any]) -> str:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ModuleNotFoundError as error:
        raise UserError(
            f"answers of chat models are checked with {error.name}; pip install 'emma-train[client]'"
        ) from None
    wrong = best_match(Draft202012Validator(schema).iter_errors(value))
    if wrong is None:
        return ""
    path = wrong.json_path.removeprefix("$").removeprefix(".")
    return f"{path}: {wrong.message[:200]}" if path else wrong.message[:200]


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
