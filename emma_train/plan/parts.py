"""Parameters of the model by part of the network, and in the units that engines divide among ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from emma_train.engine.muon import takes_muon
from emma_train.model.emma import Emma
from emma_train.model.parameter_groups import group_of
from emma_train.plan.state import Sizes
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import Stage

NETWORK_PARTS = {
    "embedding and LM head": (True, False, False, False),
    "decoder, shared": (True, True, True, True),
    "decoder, Und branch": (True, True, False, False),
    "decoder, Gen branch": (False, False, True, True),
    "vision encoder": (False, True, True, False),
    "STEM expert": (False, False, False, False),
    "router": (False, True, True, False),
    "Und adapter": (False, True, False, False),
    "Gen adapter": (False, False, True, True),
    "velocity head": (False, False, False, True),
}
"""Parts of the network, and whether each of four kinds of tokens passes through them: text, a token of an image to
understand, of a reference image, and of a target image. An image that takes the STEM expert skips as many layers of the
vision encoder."""
OWNERS = ("shared", "und", "gen", "vision", "stem_expert", "router", "und_adapter", "gen_adapter", "velocity_head")
"""Owners of the parameters of those parts, from the second part on: branches of a decoder layer, then parameter
groups."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the network."""

    name: str
    stored: int
    trained: int

    @property
    def active(self) -> tuple[int, ...]:
        """Parameters used for one token of each kind of NETWORK_PARTS."""
        return tuple(self.stored * passes for passes in NETWORK_PARTS[self.name])


def parts_of(model: Emma, stage: Stage) -> list[Part]:
    """The model's parameters by part; the autoencoder is not among them."""
    stored: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        stored[part] = stored.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + parameter.numel() * (group_of(name) in stage.trainable)
    return [Part(name, stored[name], trained[name]) for name in NETWORK_PARTS if name in stored]


def sizes_of(model: Emma, stage: Stage, generates: bool, optimizer: str = "adamw") -> Sizes:
    """What engines divide among ranks. `generates`: whether the stage runs the Gen branch at all; `optimizer`: the
    recipe's optimizer.kind."""
    freeze(model, stage.trainable)
    vision, *layers = [dict(unit.named_parameters()) for unit in (model.vision, *model.decoder.layers)]
    running = [vision, *(_running_part(layer, generates) for layer in layers if stage.loss == "tokens")]
    # Backward passes through what trains, and through all that follows it.
    in_vision, trained = any(p.requires_grad for p in vision.values()), set(stage.trainable)
    in_decoder = bool(trained & {"vision", "stem_expert", "und_adapter", "gen_adapter", "decoder"})
    backward = [unit for unit, passes in zip(running, [in_vision, *[in_decoder] * len(layers)], strict=False) if passes]
    return Sizes(
        stored=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=tuple(sorted(map(_numel, running))),
        frozen_units=sum(map(_numel, filter(_is_frozen, [vision, *layers]))),
        unused=sum(map(_numel, [vision, *layers])) - sum(map(_numel, running)),
        backward=sum(map(_numel, backward)),
        frozen_running=sum(map(_numel, filter(_is_frozen, running))),
        frozen_backward=sum(map(_numel, filter(_is_frozen, backward))),
        muon=_numel(muon_matrices(model)) if optimizer == "muon" else 0,
    )


def _running_part(layer: Mapping[str, Tensor], generates: bool) -> dict[str, Tensor]:
    return {name: p for name, p in layer.items() if generates or not name.startswith("gen.")}


def _is_frozen(unit: Mapping[str, Tensor]) -> bool:
    return not any(p.requires_grad for p in unit.values())


def muon_matrices(model: Emma) -> dict[str, Tensor]:
    """The trainable parameters that take Muon where optimizer.kind is muon."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and takes_muon(n, p.shape)}


def _numel(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values())


def _part_of(name: str) -> str:
    words = name.split(".")
    if words[0] == "decoder":
        if words[1] in ("embed_tokens", "lm_head"):
            return "embedding and LM head"
        owner = words[3] if words[1] == "layers" else words[2]
    else:
        owner = group_of(name)
    return list(NETWORK_PARTS)[1 + OWNERS.index(owner)]
