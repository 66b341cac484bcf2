"""Scores of answers: an answer in steps is right by its last part, whichever form the truth has."""

from collections.abc import Sequence
from types import SimpleNamespace

from emma_train.generate.scores import answer_items
from emma_train.generate.settings import TextSettings
from emma_train.sequence.request import Request

WRITTEN = {"a": "A 3, B 7. Answer: B", "b": "B", "c": "B 7, A 3. Answer: A", "d": "Answer: B, I think"}


def test_the_last_part_of_an_answer_counts() -> None:
    limits = []

    def generate_text(asked: Sequence[Request], settings: TextSettings) -> list[str]:
        limits.append(settings.max_tokens)
        return [WRITTEN[request.key] for request in asked]

    truths = {"a": "B", "b": "A 3, B 7. Answer: B", "c": "B", "d": "B"}
    requests = [Request(key, "i2t", "Which bar?", truth=truth, kind="stem") for key, truth in truths.items()]
    generator = SimpleNamespace(generate_text=generate_text)
    items = answer_items(generator, "held", requests, 40)  # type: ignore[arg-type]
    assert {item.key: item.verdicts["exact_match"] for item in items} == {"a": True, "b": True, "c": False, "d": False}
    assert all(item.baseline["exact_match"] for item in items) and limits == [40]
    assert items[0].output == WRITTEN["a"]
