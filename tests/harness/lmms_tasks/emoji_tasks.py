"""What the tasks of this folder ask lmms-eval to call."""

from typing import Any


def visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["question"])


def messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def rounds(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: Any = None,
    round_idx: int | None = None,
    previous_output: list[str] | None = None,
    previous_round_info: Any = None,
) -> Any:
    """Two rounds with the same question."""
    if round_idx is None:
        return messages(doc)
    return (messages(doc), round_idx >= 2, previous_output, previous_round_info)


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact": float(results[0].strip() == doc["answer"])}


def exact_in_both_rounds(doc: dict[str, Any], results: Any) -> dict[str, float]:
    first, second = results[0]
    return {"exact": float(first.strip() == doc["answer"]), "same_in_second_round": float(first == second)}


def choices(doc: dict[str, Any]) -> list[str]:
    return list(doc["choices"])


def label(doc: dict[str, Any]) -> int:
    return int(doc["label"])
