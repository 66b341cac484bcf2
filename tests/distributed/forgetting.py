"""A training command whose model seems to forget."""

from emma_train.cli import main
from emma_train.training.loop import Trainer
from emma_train.training.validation import Validation


def forgetting_command(argv: list[str], step: int) -> int:
    """A training command in which the share of right answers is 0.9 at every validation, and 0.4 from `step` on."""
    measure = Validation.measure
    validate = Trainer._validate

    def planted(self: Trainer, now: int) -> list[str]:
        Validation.measure = lambda of: {**measure(of), "val/answers": 0.9 if now < step else 0.4}  # type: ignore
        return validate(self, now)

    Trainer._validate = planted  # type: ignore[method-assign]
    return main(argv)
