"""`edit-kind`: which of the paper's seven kinds of edits (§3.3) a record's edits are, by the names that sources give.

add, remove, replace, background, tone, try-on, text; `other` for a name that is none of them, null without a name.
"""

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, Rejected, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord

KIND_WORDS = (
    ("text", r"text|ocr|word|letter"),
    ("try-on", r"try.?on|cloth|garment|outfit|dress"),
    ("background", r"background|backdrop"),
    ("tone", r"tone|style|env|weather|season|time.?of.?day|light|color|colour|relight|attribute"),
    ("replace", r"replace|swap|exchange|change.?object|substitut"),
    ("remove", r"remov|delet|erase|subtract"),
    ("add", r"\badd|_add|addition|insert"),
)
"""Kind -> words in the names that sources give (OmniEdit's task, X2I2's task_type, `kind` of a record); the first that
matches decides."""


def edit_kind(name: str) -> str:
    """One of the seven kinds, or other."""
    return next((kind for kind, words in KIND_WORDS if re.search(words, name.lower())), "other")


def _kinds(record: StoredRecord) -> Mapping[str, Any] | Rejected:
    if "it2i" not in record.rows:
        return Rejected("it has no edit")
    names = [alternative.get("kind") for alternative in record.json.get("it2i", [])]
    kinds = [edit_kind(name) if isinstance(name, str) and name else None for name in names]
    return {"kind": kinds[0] if kinds else None, "kinds": kinds}


def _start(settings: Mapping[str, Any]) -> Annotate:
    return for_each_record(_kinds)


EDIT_KIND = Operator("edit-kind", 1, {"kind": pa.string(), "kinds": pa.list_(pa.string())}, _start)
"""kinds: of each alternative; kind: of the first."""
