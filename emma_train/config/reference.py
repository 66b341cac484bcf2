"""The reference of all config keys, made from the schema: docs/config.md and `emma-train config`."""

import ast
import inspect
import json
import textwrap
import typing
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from emma_train.config.renamed import RENAMED, current_key
from emma_train.config.schema import Recipe
from emma_train.config.setting import Facts, Rule, Setting, settings_of
from emma_train.config.values import allowed_range
from emma_train.errors import UserError

COMMAND = "emma-train config --markdown > docs/config.md"
HEADER = f"""# Config reference

Every key that a recipe may set, or that `key=value` sets on the command line. This page is made from
`emma_train/config/*schema.py` by `{COMMAND}`; `emma-train config SECTION` prints a part of it.

The column *may change* says when the value may differ from that of a checkpoint:

- **any resume**: whenever a run is started again.
- **new stage**: not within a stage, because it decides what is learned from which data. `resume.allow=[key]` allows a
  change.
- **never**: not in a later stage either, because the same weights would compute something else.

A key that a checkpoint lacks counts as the value of the older behaviour. If a recipe does not set a key that may not
change, the checkpoint's value holds, even if the default has changed since; a log line names the key.
"""


@dataclass(frozen=True)
class Row:
    """A key and what is to be known about it."""

    key: str
    kind: str
    default: str
    values: str
    """Choices or range; empty allows all values of the type."""
    change: str
    """When the value may change: any resume, new stage or never."""
    description: str


@dataclass(frozen=True)
class Table:
    """The keys of a section, without those of the sections inside."""

    key: str
    description: str
    rows: list[Row]


def tables(section: str = "") -> list[Table]:
    """The reference, section by section; `section` is a section or key to which it is limited. Raises UserError."""
    section = current_key(section)
    everything = [table for table in _tables(Recipe, "", "") if table.rows]
    if not section:
        return everything
    matches = []
    for table in everything:
        if table.key == section or table.key.startswith((f"{section}.", f"{section}[")):
            matches.append(table)
        elif rows := [row for row in table.rows if row.key == section]:
            matches.append(Table(table.key, table.description, rows))
    if not matches:
        known = [name for table in everything for name in (table.key, *(row.key for row in table.rows))]
        near = get_close_matches(section, known, n=1, cutoff=0.5)
        names = ", ".join(field.key for field in settings_of(Recipe))
        raise UserError(f"unknown section {section}; " + (f"did you mean {near[0]}?" if near else f"there are {names}"))
    return matches


def as_markdown(reference: list[Table]) -> str:
    """The whole of docs/config.md."""
    parts = [HEADER]
    for table in reference:
        lines = [f"## `{table.key}`", "", _escaped(table.description), ""]
        lines += ["| key | type | default | values | may change | meaning |", "|---|---|---|---|---|---|"]
        for row in table.rows:
            cells = (f"`{row.key}`", row.kind, row.default, row.values, row.change, _escaped(row.description))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    renamed = "\n".join(f"| `{old}` | `{current_key(old)}` |" for old in RENAMED)
    parts.append(
        "## Renamed keys\n\nOld names still work in recipes, overrides and checkpoints; a warning names new ones.\n\n"
        f"| old | now |\n|---|---|\n{renamed}\n"
    )
    return "\n".join(parts)


def as_text(reference: list[Table], width: int = 100) -> str:
    """The same for a terminal of `width` columns."""
    lines = []
    for table in reference:
        lines.append(f"{table.key}: {table.description}")
        for row in table.rows:
            facts = ", ".join(part for part in (row.kind, row.values, f"may change: {row.change}") if part)
            lines.append(f"  {row.key}={row.default}  ({facts})".replace("`", ""))
            lines += textwrap.wrap(row.description, width, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)


def descriptions(schema: type) -> dict[str, str]:
    """The docstring line under each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                texts[name] = " ".join(str(text).split())
    return texts


def _tables(schema: type, prefix: str, description: str, rule: Rule = "fixed") -> list[Table]:
    texts, fields = descriptions(schema), settings_of(schema, rule)
    rows = [_row(f"{prefix}{f.key}", f, texts[f.name]) for f in fields if f.section is None]
    sections = [Table(prefix.removesuffix("."), description, rows)]
    for field in fields:
        key = f"{prefix}{field.key}"
        if field.section is not None:
            sections += _tables(field.section, f"{key}.", texts[field.name], field.rule)
        elif field.element is not None:
            sections += _tables(field.element, f"{key}[].", f"One entry of {key}.", field.rule)
    return sections


def _row(key: str, field: Setting, description: str) -> Row:
    change = "any resume" if field.rule == "free" else "never" if field.facts.handoff == "equal" else "new stage"
    default = "required" if field.required else f"`{json.dumps([] if field.element else field.default)}`"
    return Row(key, _kind(field), default, _values(field.facts), change, description)


def _kind(field: Setting) -> str:
    if field.element is not None:
        return "list of sections"
    arguments = typing.get_args(field.kind)
    if typing.get_origin(field.kind) is list:
        return f"list of {arguments[0].__name__}"
    if typing.get_origin(field.kind) is dict:
        return f"{arguments[0].__name__} to {arguments[1].__name__}"
    kinds: tuple[Any, ...] = arguments or (field.kind,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)


def _values(facts: Facts) -> str:
    if facts.choices:
        return ", ".join(f"`{choice}`" if choice != "" else "empty" for choice in facts.choices)
    return allowed_range(facts)


def _escaped(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*")
