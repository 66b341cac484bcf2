"""Rewritten prompts: which text belongs to which item."""

import json
from pathlib import Path
from typing import Any

import pytest

from emma_train.errors import RunError, UserError
from emma_train.evaluate.layouts import read_benchmark
from emma_train.evaluate.rewrites import ask_for_rewrites, read_rewrites
from tests.benchmarks import geneval_data, wise_data


def test_rewrites_belong_to_items_by_name_or_by_order(tmp_path: Path) -> None:
    _, items = read_benchmark("geneval", geneval_data(tmp_path, 3))
    wanted = [f"{item.prompt}, in a meadow" for item in items]
    lines, longer, named = tmp_path / "lines.txt", tmp_path / "longer.jsonl", tmp_path / "named.jsonl"
    lines.write_text("\n".join(wanted) + "\n")
    entries = [{**item.metadata, "prompt": text} for item, text in zip(items, wanted, strict=True)]
    longer.write_text("\n".join(json.dumps(entry) for entry in entries))
    pairs = list(zip(items, wanted, strict=True))
    named.write_text("".join(json.dumps({"name": item.name, "rewritten": text}) + "\n" for item, text in pairs[::-1]))
    assert [read_rewrites([path], items) for path in (lines, longer, named)] == [wanted] * 3


def test_rewrites_of_wise_are_three_files_with_ids(tmp_path: Path) -> None:
    _, items = read_benchmark("wise", wise_data(tmp_path, 2))
    files = []
    for part in (2, 0, 1):
        files.append(tmp_path / f"{part}_rewrite.json")
        files[-1].write_text(
            json.dumps([{"Prompt": f"longer {n}", "prompt_id": n} for n in (2 * part + 1, 2 * part + 2)])
        )
    assert read_rewrites(files, items) == [f"longer {n}" for n in range(1, 7)]
    with pytest.raises(UserError, match="has no prompt for 5 and 1 others"):
        read_rewrites(files[1:], items)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("one\ntwo\n", "has 2 prompts in order for 3 items"),
        ("one\n\nthree\n", "entry 2 has no text"),
        ("one\ntwo\nthree\nfour\n", "has 4 prompts in order for 3 items"),
    ],
)
def test_a_prompt_too_many_or_too_few_is_refused(content: str, words: str, tmp_path: Path) -> None:
    _, items = read_benchmark("geneval", geneval_data(tmp_path, 3))
    (tmp_path / "lines.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        read_rewrites([tmp_path / "lines.txt"], items)


def test_another_order_is_refused(tmp_path: Path) -> None:
    _, items = read_benchmark("geneval", geneval_data(tmp_path, 3))
    path = tmp_path / "longer.jsonl"
    path.write_text("\n".join(json.dumps({**item.metadata, "prompt": "longer"}) for item in items[::-1]))
    with pytest.raises(UserError, match="entry 1 is not in the official order"):
        read_rewrites([path], items)


class FakeChat:
    """Answers every request with its prompt and some words, but for one."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.systems = refused, set[str]()

    def ask(self, requests: Any) -> list[Any]:
        from emma_train.chat.chat import ChatAnswer

        self.systems |= {request.system for request in requests}
        return [
            ChatAnswer(failure="refused", detail="no")
            if request.content[0] == self.refused
            else ChatAnswer(value={"prompt": f"{request.content[0]} in rain"})
            for request in requests
        ]


def test_a_chat_model_rewrites_every_prompt_or_none(tmp_path: Path) -> None:
    _, items = read_benchmark("geneval", geneval_data(tmp_path, 3))
    written = ask_for_rewrites(FakeChat(), items, tmp_path)  # type: ignore[arg-type]
    assert read_rewrites([written], items) == [f"{item.prompt} in rain" for item in items]
    written.unlink()
    with pytest.raises(RunError, match="1 prompts have no rewrite, the first is 00001"):
        ask_for_rewrites(FakeChat("2 cows"), items, tmp_path)  # type: ignore[arg-type]
    assert not written.exists()
