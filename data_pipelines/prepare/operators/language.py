"""`language`: the writing system of a record's texts, and whether they are Chinese or English, by counting characters.

It names scripts, not languages: a Latin text that is not English is still `latin`. That suffices to keep Chinese apart,
which is what the recipes select by.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, Rejected, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord

SCRIPTS = {"CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "hangul"}
"""First word of a character's Unicode name -> script, where it is not the word itself in lower case."""
ENGLISH_WORDS = frozenset(
    ("the", "a", "an", "of", "and", "in", "on", "is", "are", "with", "to", "at", "for", "this", "that")
)
MIN_ENGLISH_SHARE = 0.1
"""A Latin text is English if this share of its words is among ENGLISH_WORDS; shorter ones are not judged."""
MIN_JUDGED_WORDS = 5


def script_shares(text: str) -> dict[str, float]:
    """Share of each script among the letters of a text, largest first."""
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    total = sum(counts.values())
    return {script: count / total for script, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))}


def language_of(text: str) -> str:
    """zh, ja, ko, en, the name of the script (latin, cyrillic, ...), or "" without letters."""
    shares = script_shares(text)
    if not shares:
        return ""
    if shares.get("kana", 0) > 0.1:
        return "ja"
    main = next(iter(shares))
    if main in ("han", "hangul"):
        return {"han": "zh", "hangul": "ko"}[main]
    words = [word.strip(".,:;!?\"'()").lower() for word in text.split()]
    if main == "latin" and len(words) >= MIN_JUDGED_WORDS:
        return "en" if sum(word in ENGLISH_WORDS for word in words) >= MIN_ENGLISH_SHARE * len(words) else "latin"
    return main


def _language(record: StoredRecord) -> Mapping[str, Any] | Rejected:
    text = "\n".join(record.texts())
    if not text:
        return Rejected("it has no text")
    shares = script_shares(text)
    return {"language": language_of(text), "han": shares.get("han", 0.0), "characters": len(text)}


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    word = unicodedata.name(letter, "other").split()[0]
    return SCRIPTS.get(word, word.lower())


def _start(settings: Mapping[str, Any]) -> Annotate:
    return for_each_record(_language)


LANGUAGE = Operator("language", 1, {"language": pa.string(), "han": pa.float32(), "characters": pa.int32()}, _start)
"""language as `language_of`, han: share of Chinese characters among the letters, characters: of all texts."""
