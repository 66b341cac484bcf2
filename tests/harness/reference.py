"""What the model says to the rows without any harness: the same prompts, asked of the generator one by one."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from emma_train.evaluate.harness_model import HarnessModel, Message
from emma_train.generate.settings import TextSettings
from tests.harness.rows import Row, all_choices, choice_rows, options_of, read_rows

VLMEVALKIT_SUFFIX = "\nAnswer the question using a single word or phrase."
AI2D_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


class Reference:
    """Answers by task of the tables in run.py."""

    def __init__(self, model: str) -> None:
        self.model = HarnessModel(model, "cpu", max_samples=1)
        self.rows = read_rows()
        self.choices = all_choices(self.rows)
        self.chosen = choice_rows(self.rows)

    def answers(self) -> list[str]:
        return self._ask(self.rows, [row.question for row in self.rows], 12)

    def ai2d(self) -> list[str]:
        prompts = []
        for number, row in enumerate(self.chosen):
            options = options_of(row, number, self.choices)
            lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
            prompts.append(f"{row.question}\n" + "\n".join(lines) + AI2D_SUFFIX)
        return self._ask(self.chosen, prompts, 16)

    def chart_qa(self) -> list[str]:
        return self._ask(self.rows, [row.question + VLMEVALKIT_SUFFIX for row in self.rows], 1024)

    def multiple_choice(self) -> list[str]:
        prompts = []
        for number, row in enumerate(self.chosen):
            options = options_of(row, number, self.choices)
            lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
            select = "Please select the correct answer from the options above. \n"
            prompts.append(f"Question: {row.question}\nOptions:\n{lines}{select}")
        return self._ask(self.chosen, prompts, 1024)

    def most_likely_choices(self) -> list[str]:
        best = []
        for row in self.chosen:
            request = self.model.request(row.key, [Message("user", [_opened(row), row.question])])
            likelihoods = self.model.likelihoods([request] * len(self.choices), self.choices)
            scores = [likelihood.text for likelihood in likelihoods]
            best.append(self.choices[scores.index(max(scores))])
        return best

    def _ask(self, rows: Sequence[Row], prompts: Sequence[str], max_tokens: int) -> list[str]:
        requests = [
            self.model.request(row.key, [Message("user", [_opened(row), prompt])])
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return [text.strip() for text in self.model.answers(requests, TextSettings(max_tokens=max_tokens))]


def _opened(row: Row) -> Image.Image | Path:
    return Image.open(io.BytesIO(row.image))
