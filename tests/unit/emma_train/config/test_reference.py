"""The config reference: every key described once, docs/config.md current, and what `emma-train config` prints."""

from argparse import Namespace

import pytest

from emma_train.commands import config
from emma_train.config.reference import COMMAND, as_markdown, tables
from emma_train.config.schema import Recipe
from emma_train.config.setting import all_settings
from emma_train.errors import UserError
from tests.helpers import ROOT


def test_the_document_is_current() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == as_markdown(tables()), f"docs/config.md is not current; run: {COMMAND}"


def test_every_key_is_described_once() -> None:
    rows = [row for table in tables() for row in table.rows]
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys)) and {key for key, _ in all_settings(Recipe)} <= set(keys)
    assert {"init.from", "data.sources[].path", "data.phases[].mix.i2t"} <= set(keys)
    assert all(row.description.endswith(".") for row in rows)


def test_a_row_says_what_the_schema_says() -> None:
    rows = {row.key: row for table in tables() for row in table.rows}
    lr, shared, kind = rows["optimizer.lr"], rows["model.decoder.shared"], rows["engine.kind"]
    assert (lr.kind, lr.default, lr.values, lr.change) == (
        "float",
        "required",
        "more than 0 and at most 10",
        "new stage",
    )
    assert (shared.kind, shared.default, shared.change) == ("list of str", '`["q_proj", "k_proj"]`', "never")
    assert (kind.default, kind.values, kind.change) == ('`"fsdp"`', "`fsdp`, `deepspeed`", "any resume")
    assert (rows["data.text_dropout"].values, rows["data.sources[].weight"].kind) == ("from 0 to 1", "float or null")
    assert rows["data.sources"].kind == "list of sections"


UND_KEYS = ("mode", "side", "max_tokens", "min_pixels", "min_side", "max_aspect")


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("attention", ["attention.backend"]),
        ("optimizer.clip", ["optimizer.max_grad_norm"]),
        ("data.und", [f"data.und.{key}" for key in UND_KEYS]),
    ],
)
def test_a_section_or_key_limits_the_reference(section: str, keys: list[str]) -> None:
    assert [row.key for table in tables(section) for row in table.rows] == keys


def test_an_unknown_section_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown section optimiser; did you mean optimizer?"):
        tables("optimiser")
    with pytest.raises(UserError, match="unknown section xyz; there are run, stage, model"):
        tables("xyz")


def test_the_command_prints_text_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.run(Namespace(section="flow", markdown=False), []) == 0
    text = capsys.readouterr().out
    assert "  flow.shift=1.0  (float, more than 0 and at most 1000, may change: new stage)\n      s in s*t" in text
    assert config.run(Namespace(section="", markdown=True), []) == 0
    assert capsys.readouterr().out == as_markdown(tables())


def test_a_cell_of_the_document_cannot_break_its_table() -> None:
    for line in as_markdown(tables()).splitlines():
        if line.startswith("| `") and line.count("|") > 3:
            assert line.replace("\\|", "").count("|") == 7, line
