"""Facts about a config field, kept in its metadata: allowed values, and the rules of a resume and a hand-off.

Read by the checks (config/values.py), the resume rule (training/resume_rule.py), the hand-off rule (stages/handoff.py),
stored configs (config/stored.py) and the reference (config/reference.py).
"""

import copy
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

Rule = Literal["fixed", "free"]
Form = Literal["text", "name", "path", "url"]
UNKNOWN: Any = object()
"""`absent` is not given: a stored config without the key means today's default."""


@dataclass(frozen=True)
class Facts:
    choices: tuple[Any, ...] = ()
    """The only values allowed; empty allows all."""
    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    """Bounds of a number, or of every number in a list or mapping. Every number has a lower and an upper one, far
    beyond use, so that none can overflow."""
    length: int | None = None
    """Number of entries of a list; None allows any."""
    single: bool = False
    """For a list: a recipe may give one value instead of a list with one entry."""
    form: Form = "text"
    """What a text names: text (any), name (a folder inside run.root), path (local) or url (a path or a URL)."""
    resume: Rule | None = None
    """fixed: a resumed run keeps the value. free: it may change. None: the rule of the section, by default fixed."""
    strict: bool = False
    """resume.allow cannot accept another value: the optimizer state of the checkpoint would not fit."""
    handoff: Literal["equal"] | None = None
    """equal: the value must be that of the stage before, since the weights depend on it."""
    absent: Any = UNKNOWN
    """Value of the old behaviour: what a stored config without the key means."""
    set_together: bool = False
    """For a section: a recipe that sets one of its keys sets all of them, the others to their defaults."""
    key: str = ""
    """Name in recipes, if it differs from the field's."""


def setting(default: Any, **facts: Any) -> Any:
    """A dataclass field with its default and its facts. The default of a required field is MISSING."""
    metadata = {"facts": Facts(**facts)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, **facts: Any) -> Any:
    """A dataclass field that holds a section, the dataclass `kind` with its defaults."""
    return dataclasses.field(default_factory=kind, metadata={"facts": Facts(**facts)})


@dataclass(frozen=True)
class Setting:
    """One field of a section."""

    name: str
    """Attribute of the dataclass."""
    key: str
    """Name in recipes."""
    kind: Any
    """Type."""
    default: Any
    facts: Facts
    rule: Rule
    """Whether a resumed run must keep the value: the field's own rule, or else that of its section."""

    @property
    def section(self) -> type | None:
        """The dataclass of a field that is a section."""
        return self.kind if dataclasses.is_dataclass(self.kind) else None  # type: ignore[return-value]

    @property
    def element(self) -> type | None:
        """The dataclass of the entries of a field that lists sections."""
        inner = typing.get_args(self.kind)
        is_list = typing.get_origin(self.kind) is list and dataclasses.is_dataclass(inner[0])
        return inner[0] if is_list else None

    @property
    def required(self) -> bool:
        return bool(self.default == MISSING)

    @property
    def old_value(self) -> Any:
        """The value that a stored config without this key means."""
        return self.default if self.facts.absent is UNKNOWN else copy.deepcopy(self.facts.absent)


def settings_of(schema: type, rule: Rule = "fixed") -> list[Setting]:
    """The fields of a section in order; `rule` is the resume rule of the section itself."""
    settings = []
    for field in dataclasses.fields(schema):
        if "facts" not in field.metadata:
            continue
        facts: Facts = field.metadata["facts"]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        settings.append(Setting(field.name, facts.key or field.name, field.type, default, facts, facts.resume or rule))
    return settings


def all_settings(schema: type, prefix: str = "", rule: Rule = "fixed") -> Iterator[tuple[str, Setting]]:
    """(dotted key, field) of every field that is no section, in order."""
    for field in settings_of(schema, rule):
        if field.section is None:
            yield f"{prefix}{field.key}", field
        else:
            yield from all_settings(field.section, f"{prefix}{field.key}.", field.rule)
