"""Rules of the code that no linter knows: short functions and files, one definition of a name, telling names.

`python tests/unit/test_house.py [FOLDER ...]` prints what breaks them, one line each.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("emma_train", "data_pipelines", "launchers")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
VAGUE = {"told", "found", "own", "mine", "whole", "held", "there", "place"}
"""Words that say neither the type nor the role of a value."""
DEFINED_OFTEN = {
    "log": "one logger per file",
    "main": "one entry point per program",
    "add_arguments": "one per command",
    "run": "one per command",
}
"""Public names that several files may define, and why."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def long_files(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_FILE_LINES:
            yield f"{path.relative_to(ROOT)}: {num_lines} lines, more than {MAX_FILE_LINES}"


def long_functions(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    problem = f"{node.name} has {num_lines} lines, more than {MAX_FUNCTION_LINES}"
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {problem}"


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every identifier of a syntax tree with its line, those inside f-strings too."""
    line = 0
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        if isinstance(node, ast.Constant):
            continue
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield from ((part, line) for part in text.split("."))


def vague_names(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for name, line in sorted(set(identifiers(ast.parse(path.read_text()))), key=lambda pair: pair[1]):
            if name.strip("_") in VAGUE:
                yield f"{path.relative_to(ROOT)}:{line}: identifier `{name}` says neither type nor role"


def public_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level, without those that start with an underscore."""
    body: list[ast.stmt] = list(tree.body)
    for statement in body:
        names: list[str] = []
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            nodes = [node for target in targets for node in ast.walk(target)]
            names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        elif isinstance(statement, ast.If | ast.Try):
            for block in ("body", "orelse", "handlers", "finalbody"):
                for part in getattr(statement, block, []):
                    body.extend(part.body if isinstance(part, ast.ExceptHandler) else [part])
        yield from (name for name in names if not name.startswith("_"))


def names_defined_twice(paths: list[Path]) -> Iterator[str]:
    files: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        file = str(path.relative_to(ROOT))
        for name in public_names(ast.parse(path.read_text())):
            if name not in DEFINED_OFTEN:
                files[name].add(file)
    for name, where in sorted(files.items()):
        if len(where) > 1:
            first, *others = sorted(where)
            yield f"{first}: `{name}` is also defined in {', '.join(others)}"


def missing_documents(paths: list[Path]) -> Iterator[str]:
    """Markdown files that a source names and the repository does not have."""
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for name in re.findall(r"(?<![\w/{}*.-])[\w/.-]+\.md\b", line):
                folders = (ROOT, ROOT / "docs", path.parent, *ROOT.glob("recipes/tiny/assets/*"))
                if not any((folder / name).is_file() for folder in folders):
                    yield f"{path.relative_to(ROOT)}:{number}: {name} does not exist"


def hidden_copies(paths: list[Path]) -> Iterator[str]:
    """torch.tensor(..., device=...): a copy to the device for which the host waits, and which no dispatch mode sees."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            copies = isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor")
            if copies and any(keyword.arg == "device" for keyword in node.keywords):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)} copies to the device"


EVERYWHERE = sources(*PACKAGES, "tests")
RULES = {
    "files are short": (long_files, EVERYWHERE),
    "functions are short": (long_functions, EVERYWHERE),
    "names say type or role": (vague_names, EVERYWHERE),
    "a public name is defined in one file": (names_defined_twice, sources(*PACKAGES)),
    "documents that are named exist": (missing_documents, EVERYWHERE),
    "a step copies nothing unseen": (
        hidden_copies,
        sources(*(f"emma_train/{room}" for room in ("model", "objectives", "training", "engine"))),
    ),
}


def problems(rule: str) -> list[str]:
    check, paths = RULES[rule]
    return list(check(paths))


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_to(rule: str) -> None:
    assert problems(rule) == []


def test_the_rules_see_what_breaks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    one, other, document = tmp_path / "one.py", tmp_path / "other.py", "docs/nowhere" + ".md"
    one.write_text("def f(x):\n    return f'{_told.own}' % dict(whole=x)\n\n\nA, B = 1, 2\nif A:\n    C = 3\n")
    other.write_text(f"# see {document}\nC = 4\n\n\ndef g():\n" + "    print()\n" * 500)
    both = [one, other]
    assert {line.split("`")[1] for line in vague_names(both)} == {"_told", "own", "whole"}
    assert list(long_files(both)) == ["other.py: 505 lines, more than 450"]
    assert list(long_functions(both)) == ["other.py:5: g has 501 lines, more than 60"]
    assert list(names_defined_twice(both)) == ["one.py: `C` is also defined in other.py"]
    assert list(missing_documents(both)) == [f"other.py:1: {document} does not exist"]
    one.write_text("a = torch.tensor([1])\nb = torch.tensor(\n    [1], device=a.device\n)\n")
    assert list(hidden_copies([one])) == ["one.py:2: torch.tensor copies to the device"]


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or (*PACKAGES, "tests")
    print("\n".join(line for rule in RULES for line in problems(rule) if line.startswith(wanted)))
