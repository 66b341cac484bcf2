"""FSDP's units of the vision encoder."""

from collections import Counter

import torch

from emma_train.config.schema import ModelConfig
from emma_train.engine.units import parameters_of, vision_units
from emma_train.model.emma import Emma


def vision(stage4: bool) -> torch.nn.Module:
    config = ModelConfig()
    config.decoder.num_layers = config.decoder.num_shared_layers = 0
    config.vision.stem_expert = config.vision.router = stage4
    with torch.device("meta"):
        return Emma(config).vision


def test_runs_of_nine_layers_and_what_is_left() -> None:
    encoder = vision(stage4=False)
    units = vision_units(encoder)
    assert [len(unit) for unit in units.modules] == [9, 9, 9, 1] and not units.experts
    assert [layer for unit in units.shared for layer in unit] == list(encoder.layers)
    left = {name for name, p in encoder.named_parameters() if any(p is q for q in parameters_of(units.modules)[-1])}
    assert {name.split(".")[0] for name in left} == {"patch_embedding", "position_embedding", "post_layernorm"}


def test_layers_of_experts_are_in_units_of_their_own() -> None:
    encoder = vision(stage4=True)
    units, experts = vision_units(encoder), encoder.config.expert_layers
    shared = len(encoder.layers) - experts
    assert sum(len(unit) for unit in units.shared) == shared and max(map(len, units.shared)) == 9
    assert [layer for unit in units.experts for layer in unit] == [*encoder.layers[shared:], *encoder.stem_layers]


def test_every_parameter_is_in_one_unit() -> None:
    encoder = vision(stage4=True)
    counts = Counter(p for unit in parameters_of(vision_units(encoder).modules) for p in unit)
    assert set(counts) == set(encoder.parameters()) and set(counts.values()) == {1}
