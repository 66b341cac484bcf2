"""Answers that reason before they answer: the part that counts."""

ANSWER_MARK = "Answer: "
"""Stands before the answer of a text that reasons first."""


def final_answer(text: str) -> str:
    """The text after the last ANSWER_MARK, or all of it where there is no mark, without spaces at both ends."""
    return text.rpartition(ANSWER_MARK)[2].strip()
