"""What an operator is: a named function from a batch of records to columns, such as `size`, `faces` or `caption`.

To write one, make a file in prepare/operators/ and add a line to OPERATORS below:

    def _start(settings):                       # once in each process: load the model, open the client
        detector = load(settings["model"])

        def annotate(records):                  # for each batch of records of one shard, in the order of the tar
            counts = [len(detector(record.image(record.image_names[0]))) for record in records]
            return {"count": counts}            # one value a record for each column

        return annotate

    FACES = Operator("faces", 1, {"count": pa.int32()}, _start, {"model": ""})

`emma-data annotate faces FOLDER --set model=...` then writes shard-000000.faces.parquet beside each shard: the column
`key`, then the operator's columns, one row for each record that was not rejected, in the order of the tar. Name,
version and settings are in the metadata of the file.

The columns must be a function of the records and settings alone: not of batch size, order, worker, process, clock or
a random generator without a seed from the record's key (`emma_train.sequence.seeds.seed_of`). A model that is not
deterministic on a device is excused; a job never computes a finished shard again.

A record that cannot be annotated is rejected with a reason, in one of two ways, and never gets a guessed value:
* `Rejected("the endpoint answered 500 four times")` in the place of its value, in any column;
* an exception of READ_ERRORS, for example from `record.image(...)`. The batch is then annotated again record by record,
  and those that raise are rejected. `for_each_record` does so from the start.
A UserError or RunError (a missing model, an endpoint that refuses the key) ends the job.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError

OPERATORS = {
    "aesthetic": "data_pipelines.prepare.operators.aesthetic:AESTHETIC",
    "caption": "data_pipelines.prepare.operators.caption:CAPTION",
    "decontaminate": "data_pipelines.prepare.operators.decontaminate:DECONTAMINATE",
    "edit-kind": "data_pipelines.prepare.operators.edit_kind:EDIT_KIND",
    "faces": "data_pipelines.prepare.operators.faces:FACES",
    "judge-edit": "data_pipelines.prepare.operators.judge_edit:JUDGE_EDIT",
    "language": "data_pipelines.prepare.operators.language:LANGUAGE",
    "ocr": "data_pipelines.prepare.operators.ocr:OCR",
    "phash": "data_pipelines.prepare.operators.phash:PHASH",
    "quality": "data_pipelines.prepare.operators.quality:QUALITY",
    "safety": "data_pipelines.prepare.operators.safety:SAFETY",
    "size": "data_pipelines.prepare.operators.size:SIZE",
    "stem": "data_pipelines.prepare.operators.stem:STEM_OPERATOR",
    "stem-vlm": "data_pipelines.prepare.operators.stem_vlm:STEM_VLM",
}
"""Where each operator is defined, as module:variable; imported when it is used."""
READ_ERRORS = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What libraries raise on foreign data."""

Columns = Mapping[str, Sequence[Any]]
"""One value a record for each column, in the order of the batch; a value may be a Rejected."""
Annotate = Callable[[Sequence[StoredRecord]], Columns]


@dataclass(frozen=True)
class Rejected:
    """In the place of a value: the record cannot be annotated."""

    reason: str


@dataclass(frozen=True)
class Operator:
    """A function over records, as data."""

    name: str
    """As typed; part of the names of its files."""
    version: int
    """Raise it with each change after which the same record has other values."""
    columns: Mapping[str, pa.DataType]
    """Without `key`. A value may be None (null), nested types are allowed; names are those of SQL identifiers."""
    start: Callable[[Mapping[str, Any]], Annotate]
    """Called with the settings once in each process. It imports heavy libraries and loads models."""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """All settings with their defaults (bool, int, float, str or a list). `--set key=value` changes them; the type of a
    value must be that of the default."""
    not_identity: frozenset[str] = frozenset()
    """Settings that change speed or access and not the values, such as the number of requests at once or a time limit.
    A change of any other setting makes all shards be computed again."""
    reads: tuple[str, ...] = ()
    """Operators whose columns it needs; `record.columns[operator][column]` has the values. Its job fails where they
    have not run. A record that one of them rejected is rejected."""
    optional_reads: tuple[str, ...] = ()
    """The same, but where they have not run, and for records that they rejected, `record.columns` lacks them."""
    files: frozenset[str] = frozenset()
    """Settings that name files or folders (one or a list): their content is part of the identity."""
    batch_size: int = 64
    """Most records in a call; all their members may be in memory."""
    cpus: float = 1
    """CPUs of a task on the cluster."""
    gpus: float = 0
    """GPUs of a task on the cluster."""

    def with_settings(self, changes: Mapping[str, Any]) -> "Operator":
        """With other settings. Raises UserError on a key that it does not have and on a value of another type."""
        settings = dict(self.settings)
        for key, value in changes.items():
            if key not in settings:
                names = ", ".join(settings) or "none"
                raise UserError(f"--set {key}: the operator {self.name} has no such setting; it has {names}")
            settings[key] = _as_type_of(settings[key], value, f"--set {key} of the operator {self.name}")
        return replace(self, settings=MappingProxyType(settings))

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version and the settings that decide its values, as the metadata of its files has them."""
        settings = {key: value for key, value in sorted(self.settings.items()) if key not in self.not_identity}
        return {"operator": self.name, "version": self.version, "settings": settings}

    @property
    def schema(self) -> pa.Schema:
        """Of its files, with `identity` as metadata."""
        columns = [("key", pa.string()), *self.columns.items()]
        return pa.schema(columns, metadata={METADATA_KEY: json.dumps(self.identity, sort_keys=True)})


METADATA_KEY = b"emma_operator"
"""Metadata key of an operator's files: its identity as JSON."""


def load_operator(name: str, function: str = "") -> Operator:
    """An operator by its name, or `function`, a user's own as package.module:name, under that name.

    `function` names an Operator, or a plain function from a batch of records to columns. The types of the latter's
    columns are in its attribute `columns` (a mapping of names to Arrow types); a change of its source changes its
    identity. Raises UserError.
    """
    if not name.isidentifier() and not name.replace("-", "_").isidentifier():
        raise UserError(f"operator {name!r}: give a name of letters, digits and -, as it becomes part of file names")
    if not function and name not in OPERATORS:
        raise UserError(
            f"operator {name}: there is none of this name; there are {', '.join(OPERATORS)}, "
            f"and functions of yours by --operator package.module:function"
        )
    value = _import(function or OPERATORS[name])
    if isinstance(value, Operator):
        return replace(value, name=name)
    columns = getattr(value, "columns", None)
    if not callable(value) or not isinstance(columns, Mapping):
        raise UserError(
            f"--operator {function}: is no function with types of its columns; "
            f'write {function.partition(":")[2]}.columns = {{"score": pyarrow.float32()}} below it'
        )
    return Operator(name, 1, columns, lambda _: value, {"source": _source(value)})


def for_each_record(annotate_one: Callable[[StoredRecord], Mapping[str, Any] | Rejected]) -> Annotate:
    """A function over batches, from one over a record that returns a value for each column or a Rejected. A record
    for which it raises one of READ_ERRORS is rejected."""

    def annotate(records: Sequence[StoredRecord]) -> Columns:
        results: list[Mapping[str, Any] | Rejected] = []
        for record in records:
            try:
                results.append(annotate_one(record))
            except READ_ERRORS as error:
                results.append(Rejected(reason_of(error)))
        names = next((list(values) for values in results if not isinstance(values, Rejected)), [""])
        return {
            name: [values if isinstance(values, Rejected) else values[name] for values in results] for name in names
        }

    return annotate


def reason_of(error: Exception) -> str:
    """A reason for the reject file, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _import(reference: str) -> Any:
    module, colon, variable = reference.partition(":")
    if not colon:
        raise UserError(f"--operator {reference}: give package.module:function")
    try:
        return getattr(importlib.import_module(module), variable)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise UserError(f"{reference}: needs the package {error.name}, which is not installed") from error
        raise UserError(f"--operator {reference}: there is no module {module} on PYTHONPATH") from error
    except AttributeError:
        raise UserError(f"--operator {reference}: the module {module} has no {variable}") from None


def _source(function: Callable[..., Any]) -> str:
    """Hash of a function's source."""
    import hashlib

    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{name}: {value!r} is {type(value).__name__}, must be {type(default).__name__}")
    return value
