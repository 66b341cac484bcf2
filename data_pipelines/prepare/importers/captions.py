"""Caption pairs of sources: texts that stand for an image, from a member, column or file."""

import json
from typing import Any

from data_pipelines.prepare.importers.item import clean_text


def caption_texts(value: Any) -> tuple[str, ...]:
    """Captions in a value: one, a list, or those of an object by name; each once, without empty ones. Raises
    ValueError."""
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    texts = tuple(dict.fromkeys(text for text in map(clean_text, values) if text))
    if not texts:
        raise ValueError("no caption")
    return texts


def json_captions(text: Any) -> tuple[str, ...]:
    """Captions in a text of JSON, as BAGEL's t2i sets have them: {any name: caption}. Raises ValueError."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("its captions are no JSON") from None
    return caption_texts(value)
