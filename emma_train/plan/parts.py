"""Parameters of the model by part of the network, and in the units that engines divide among ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from emma_train.engine.muon import takes_muon
from emma_train.engine.units import parameters_of, vision_units
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
Unit = Mapping[str, Tensor]
"""Parameters that are gathered together, by name."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the network."""

    name: str
    stored: int
    trained: int
    passes: tuple[bool, ...]
    """Whether a token of each kind of NETWORK_PARTS passes through it."""

    @property
    def active(self) -> tuple[int, ...]:
        """Parameters used for one token of each kind of NETWORK_PARTS."""
        return tuple(self.stored * passes for passes in self.passes)


def parts_of(model: Emma, stage: Stage) -> list[Part]:
    """The model's parameters by part; the autoencoder is not among them."""
    stored: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        stored[part] = stored.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + parameter.numel() * (group_of(name) in stage.trainable)
    used = dict(NETWORK_PARTS)
    if model.config.adapters == "one":
        used["Und adapter"] = (False, True, True, True)
    if model.config.fusion == "latent":
        used["vision encoder"] = (False,) * 4
    return [Part(name, stored[name], trained[name], passes) for name, passes in used.items() if name in stored]


def sizes_of(model: Emma, stage: Stage, generates: bool, optimizer: str = "adamw") -> Sizes:
    """What engines divide among ranks. `generates`: whether the stage runs the Gen branch at all; `optimizer`: the
    recipe's optimizer.kind."""
    freeze(model, stage.trainable)
    names = {p: name for name, p in model.named_parameters()}
    cut = vision_units(model.vision)
    of_vision: list[Unit] = [{names[p]: p for p in unit} for unit in parameters_of(cut.modules)]
    rest = of_vision.pop()
    layers: list[Unit] = [dict(layer.named_parameters()) for layer in model.decoder.layers]
    # Router tuning runs neither the experts nor the decoder.
    tokens, shared = stage.loss == "tokens", len(cut.shared)
    running_vision = [*of_vision[: None if tokens else shared], rest]
    running_layers = [_running_part(layer, generates) for layer in layers if tokens]
    # Backward passes through what trains, and through all that follows it; in the vision encoder that is its last norm.
    # The last decoder layer stays gathered from forward to backward.
    trained = set(stage.trainable)
    in_decoder = bool(trained & {"vision", "stem_expert", "und_adapter", "gen_adapter", "decoder"})
    backward = [unit for unit in running_vision if not _is_frozen(unit)]
    if backward and _is_frozen(rest):
        backward.append(rest)
    backward += running_layers[:-1] if in_decoder else []
    running, everything = [*running_vision, *running_layers], [*of_vision, rest, *layers]
    return Sizes(
        stored=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=tuple(sorted(map(_numel, running))),
        frozen_units=sum(map(_numel, filter(_is_frozen, everything))),
        unused=sum(map(_numel, everything)) - sum(map(_numel, running)),
        backward=sum(map(_numel, backward)),
        frozen_running=sum(map(_numel, filter(_is_frozen, running))),
        frozen_backward=sum(map(_numel, filter(_is_frozen, backward))),
        muon=_numel(muon_matrices(model)) if optimizer == "muon" else 0,
    )


def _running_part(layer: Unit, generates: bool) -> Unit:
    return {name: p for name, p in layer.items() if generates or not name.startswith("gen.")}


def _is_frozen(unit: Unit) -> bool:
    return not any(p.requires_grad for p in unit.values())


def muon_matrices(model: Emma) -> dict[str, Tensor]:
    """The trainable parameters that take Muon where optimizer.kind is muon."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and takes_muon(n, p.shape)}


def _numel(parameters: Unit) -> int:
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
