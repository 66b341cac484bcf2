"""Recognises GPT-Image-Edit-1.5M, which EMMA excludes because its edits do not keep the subject (paper §3.3).

Any rule that applies refuses the data: at import, at indexing, and at the start of training from the provenance in the
manifest. OmniEdit-Filtered-1.2M, from which that set took its inputs, is another set and no rule applies to it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from emma_train.errors import UserError

EXCLUDED_SET = "GPT-Image-Edit-1.5M"
_NAMES = re.compile(r"gpt-image-edit-(1\.5m|training)", re.IGNORECASE)
_FOLDERS = re.compile(r"gpt-edit/(hqedit|omniedit|ultraedit)(/|$)")
_ANNOTATIONS = re.compile(
    r"(^|/)(hqedit_gpt_edit|hqedit_gpt_generate|omniedit_gpt|omniedit_gpt_rewrite|complexedit_gpt|ultraedit_gpt)\.json\b"
)
_IDS = re.compile(r"^(hqedit|omniedit|ultraedit)_")
_ORIGINS = frozenset(("hqedit", "omniedit", "ultraedit"))
_COLUMNS = frozenset(("dataset_source", "instruction_type", "input_description", "input", "output"))
_ID_KEYS = ("id", "key", "__key__")


def refuse_names(names: Iterable[object], where: object) -> None:
    """Raise UserError where a name of a data set, path, URL or member is of the excluded set."""
    for name in names:
        _refuse(_name_rule(str(name)), where)


def refuse_columns(columns: Iterable[str], where: object) -> None:
    """Raise UserError where columns of a table, or keys of its rows, are those of the excluded set."""
    _refuse(_column_rule(set(columns)), where)


def refuse_row(row: Mapping[str, Any], where: object) -> None:
    """Raise UserError where a row of a source, or the JSON of a record, is of the excluded set."""
    _refuse(_row_rule(row), where)


def refuse_key(key: str, where: object) -> None:
    """Raise UserError where the key of a record is one of the excluded set."""
    _refuse(_id_rule(key.rpartition("/")[2]) or _name_rule(key), where)


def refuse_members(key: str, members: Mapping[str, bytes], where: object) -> None:
    """Raise UserError where a record of a tar is of the excluded set, by its key or the keys and values of its JSON."""
    refuse_key(key, where)
    try:
        row = json.loads(members.get("json", b"null"))
    except (ValueError, RecursionError):
        return
    if isinstance(row, Mapping):
        refuse_row(row, f"{where}: record {key}")
        refuse_provenance(row.get("provenance"), f"{where}: record {key}")


def refuse_provenance(provenance: object, where: object) -> None:
    """Raise UserError where the provenance of a manifest names the excluded set, at any depth."""
    if isinstance(provenance, Mapping):
        _refuse(_row_rule(provenance), where)
        for value in provenance.values():
            refuse_provenance(value, where)
    elif isinstance(provenance, list | tuple):
        for value in provenance:
            refuse_provenance(value, where)
    elif isinstance(provenance, str):
        _refuse(_name_rule(provenance), where)


def _refuse(rule: str, where: object) -> None:
    if rule:
        raise UserError(
            f"{where}: is data of {EXCLUDED_SET} ({rule}); EMMA excludes that set, because its edits do not keep the "
            "subject; leave it out"
        )


def _name_rule(name: str) -> str:
    if match := _NAMES.search(name):
        return f"rule name: {match[0]}"
    if match := _FOLDERS.search(name):
        return f"rule path: {match[0]}"
    if match := _ANNOTATIONS.search(name):
        return f"rule annotation file: {match[0].strip('/')}"
    return ""


def _column_rule(columns: set[str]) -> str:
    return f"rule columns: {', '.join(sorted(_COLUMNS))}" if columns >= _COLUMNS else ""


def _id_rule(name: object) -> str:
    match = _IDS.match(name) if isinstance(name, str) else None
    return f"rule id: {match[0]}..." if match else ""


def _row_rule(row: Mapping[str, Any]) -> str:
    if rule := _column_rule(set(row)):
        return rule
    origin = row.get("dataset_source")
    if isinstance(origin, str) and origin.lower() in _ORIGINS:
        return f"rule dataset_source: {origin}"
    rules = [_id_rule(row[key]) for key in _ID_KEYS if key in row]
    texts = (text for value in row.values() for text in (value if isinstance(value, list) else [value]))
    rules += [_name_rule(text) for text in texts if isinstance(text, str) and len(text) < 1024]
    return next(filter(None, rules), "")
