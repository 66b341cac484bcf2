"""Which modules of the vision encoder FSDP gathers together; a decoder layer is a unit by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from emma_train.model.vision import VisionEncoder

LAYERS = 9
"""Most layers of a unit: a third of SigLIP2-so400m, which has about the size of a decoder layer of EMMA-4B. If all
were one unit, the first layer would wait until the last one is gathered."""


@dataclass(frozen=True)
class VisionUnits:
    """Units of layers, in forward order. FSDP frees a unit when all its modules have run, so the layers of an expert,
    which router tuning does not run, are not in one unit with others."""

    shared: list[list[nn.Module]]
    experts: list[list[nn.Module]]
    """Empty where there is no STEM expert."""
    encoder: VisionEncoder
    """A unit of what the others leave."""

    @property
    def modules(self) -> list[list[nn.Module]]:
        """Of every unit; the encoder's last."""
        return [*self.shared, *self.experts, [self.encoder]]


def vision_units(vision: VisionEncoder) -> VisionUnits:
    """Cut the encoder into units."""
    if vision.stem_layers is None:
        return VisionUnits(_cut(vision.layers), [], vision)
    shared = len(vision.layers) - vision.config.expert_layers
    return VisionUnits(_cut(vision.layers[:shared]), [*_cut(vision.layers[shared:]), *_cut(vision.stem_layers)], vision)


def parameters_of(units: Sequence[Sequence[nn.Module]]) -> list[list[nn.Parameter]]:
    """The parameters of each unit, without those of the units before it."""
    taken: set[nn.Parameter] = set()
    result = []
    for modules in units:
        parameters = {p: None for module in modules for p in module.parameters() if p not in taken}
        taken.update(parameters)
        result.append(list(parameters))
    return result


def _cut(layers: nn.ModuleList) -> list[list[nn.Module]]:
    return [list(layers[start : start + LAYERS]) for start in range(0, len(layers), LAYERS)]
