"""URLs without what gives access: user, password, and query (an access token). For all that is written or shown."""

import re
from typing import Any, TypeVar, cast

_URL = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*://)(?:[^\s/?#@'\"]*@)?([^\s?#'\"]*)(?:\?[^\s'\",\]})]*)?")
Value = TypeVar("Value")


def without_secrets(value: Value) -> Value:
    """A text, or the texts in lists and dicts, with every URL as messages and files may show it."""
    shown: Any = value
    if isinstance(value, str):
        shown = _URL.sub(r"\1\2", value)
    elif isinstance(value, list):
        shown = [without_secrets(entry) for entry in value]
    elif isinstance(value, dict):
        shown = {key: without_secrets(entry) for key, entry in value.items()}
    return cast(Value, shown)
