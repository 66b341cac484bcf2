"""Answers that reason before they answer: the part that counts."""

ANSWER_MARK = "Answer: "
"""Stands before the answer of a text that reasons first."""


def final_answer(text: str) -> str:
    """What stands after the last ANSWER_MARK, or all of a text without one; without spaces around it."""
    return text.rpartition(ANSWER_MARK)[2].strip()
