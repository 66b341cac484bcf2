"""The documents against the code: the table of imports is the linter's, and files that they name exist."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TABLES = {"rooms": "| floor | package |", "pipelines": "| floor | package of `data_pipelines` |"}
"""Contract of the linter -> first line of its table."""


def floors_of_linter(contract: str) -> list[set[str]]:
    """Packages of each floor, from the top down, as import-linter reads them."""
    config = configparser.ConfigParser(inline_comment_prefixes=None, comment_prefixes=("#",))
    config.read(ROOT / "setup.cfg")
    lines = config[f"importlinter:contract:{contract}"]["layers"].split("\n")
    return [set(re.findall(r"\w+", line)) for line in lines if line.strip()]


def floors_of_table(first_line: str) -> list[set[str]]:
    """Packages of each floor, from the top down, as docs/design.md lists them."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = text[text.index(first_line) :].split("\n\n")[0]
    floors: dict[int, set[str]] = {}
    for number, package in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE):
        floors.setdefault(int(number), set()).add(package)
    assert sorted(floors) == list(range(1, len(floors) + 1))
    return [floors[number] for number in sorted(floors)]


@pytest.mark.parametrize("contract", TABLES)
def test_the_table_of_imports_is_the_linters(contract: str) -> None:
    assert floors_of_table(TABLES[contract]) == floors_of_linter(contract)


def test_the_drawing_has_the_same_floors() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    drawing = text[text.index(" emma_train   ") :].split("```")[0]
    lines = [set(re.findall(r"\w+", re.split(r"\.\.\.|<-|  {6,}", line)[0])) for line in drawing.splitlines()[2:]]
    undrawn = ({"__main__"}, {"doctor"})
    assert lines == [floor for floor in floors_of_linter("rooms") if floor not in undrawn]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths in backticks, from the root or from a package; links from the document."""
    text = document.read_text()
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|cfg|toml|png))`", text):
        roots = (ROOT, ROOT / "emma_train", ROOT / "data_pipelines")
        if name.startswith(("runs/", "site/")) or re.search(r"(?<![a-zA-Z])[A-Z]+(?![a-zA-Z])", name):
            continue  # written by a command; or a placeholder
        assert any((root / name).exists() for root in roots), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), link
