"""How images stand in a sequence: EMMA's way, and other ways that it is compared with (model.fusion,
model.und_attention, model.image_positions). What the tokens of an image are made of is the model's part
(model/emma.py)."""

from dataclasses import dataclass

from emma_train.config.schema import ModelConfig


@dataclass(frozen=True)
class ImageRules:
    """The defaults are EMMA's."""

    full_und: bool = False
    """Whether a token of an understanding image sees all of its image, as in BAGEL, not only what is before it."""
    one_position: bool = False
    """Whether all tokens of an image have one rotary position, as in BAGEL, not one each."""
    separate: bool = False
    """Whether a given image has its semantic tokens and after them its latent ones, as in BAGEL, not one kind for
    both."""

    @property
    def tokens_per_cell(self) -> int:
        """Tokens of each cell of the grid of an image that is given."""
        return 2 if self.separate else 1


EMMA_RULES = ImageRules()


def image_rules(config: ModelConfig) -> ImageRules:
    """The rules that a model is trained with, and must generate with."""
    return ImageRules(config.und_attention == "full", config.image_positions == "one", config.fusion == "token")
