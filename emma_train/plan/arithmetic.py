"""Parameters, memory, FLOPs and time of a recipe on N GPUs of a kind.

The model is built on the meta device and never allocated. Memory is what the code takes today.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emma_train.config.mix import phases
from emma_train.config.schema import Recipe
from emma_train.engine.activation_checkpointing import checkpointed_layers
from emma_train.errors import UserError
from emma_train.flops.formulas import PEAK_DENSE_BF16, autoencoder_flops
from emma_train.flops.work import Work, module_flops
from emma_train.model.cross_entropy import ROWS
from emma_train.model.emma import Emma
from emma_train.plan.samples import Load, load_of
from emma_train.plan.state import Sizes, state_memory
from emma_train.stages.freeze import freeze, group_of
from emma_train.stages.stage import Stage, makes_images, stage_of

GIB = 2**30
CARDS: dict[str, tuple[float, float]] = {
    "a100-40g": (39.6, PEAK_DENSE_BF16["A100"]),
    "a100-80g": (79.3, PEAK_DENSE_BF16["A100"]),
    "b200-192g": (178.4, PEAK_DENSE_BF16["B200"]),
    "h100-80g": (79.2, PEAK_DENSE_BF16["H100 SXM"]),
    "h100-nvl-94g": (93.1, PEAK_DENSE_BF16["H100 NVL"]),
    "h100-pcie-80g": (79.2, PEAK_DENSE_BF16["H100 PCIe"]),
    "h200-141g": (139.8, PEAK_DENSE_BF16["H200"]),
    "l40s-48g": (44.5, PEAK_DENSE_BF16["L40S"]),
    "mi300x-192g": (191.5, PEAK_DENSE_BF16["MI300X"]),
    "rtx4090-24g": (23.6, PEAK_DENSE_BF16["RTX 4090"]),
}
"""Kinds of GPU: GiB that a process can use, and dense bf16 FLOP/s."""
MFU = 0.40
"""Assumed share of the dense bf16 peak."""
RESERVE = 0.10
"""Share of the card left to the CUDA context, NCCL and fragmentation."""
TF32_COST = 2.0
"""The autoencoder's convolutions run in TF32, at half the bf16 peak."""
DC_AE_F32C32: dict[str, Any] = {
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "attention_head_dim": 32,
    "downsample_block_type": "Conv",
}
DC_AE_PARAMETERS = 312_250_275
"""dc-ae-f32c32-sana-1.0, taken where the recipe's folder is not there."""


PARTS = {
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
"""Parts of the network, and whether a token of text, of an understood, a reference and a target image passes through
them. An image that takes the STEM expert leaves out as many layers of the encoder."""
OWNERS = ("shared", "und", "gen", "vision", "stem_expert", "router", "und_adapter", "gen_adapter", "velocity_head")
"""The same parts from the second on: owners of the decoder's modules, then parameter groups."""
TRANSIENT = ("decoder's activations", "encoder's activations", "one layer's backward", "logits")
"""Memory that is free while the autoencoder runs."""


@dataclass(frozen=True)
class Part:
    """Parameters that live and learn together."""

    name: str
    stored: int
    trained: int

    @property
    def active(self) -> tuple[int, ...]:
        """Parameters that work for one token of text, of an understood, a reference and a target image."""
        return tuple(self.stored * passes for passes in PARTS[self.name])


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    kept: dict[str, float]
    """Held at the same time in the backward pass."""
    encoding: float
    """Working set of the autoencoder, before the forward pass and so not beside activations."""

    @property
    def peak(self) -> float:
        resident = sum(size for name, size in self.kept.items() if name not in TRANSIENT)
        return max(sum(self.kept.values()), resident + self.encoding)


class Plan:
    """A recipe on `num_gpus` GPUs of a kind, which reach the share `mfu` of their peak."""

    def __init__(self, recipe: Recipe, where: str, num_gpus: int, gpu_name: str, mfu: float = MFU) -> None:
        """Raises UserError on an unknown kind of GPU or a recipe that is no stage."""
        if num_gpus < 1:
            raise UserError(f"--gpus {num_gpus}: at least one GPU is needed")
        if gpu_name not in CARDS:
            raise UserError(f"--gpu {gpu_name}: not a known kind of GPU; known are {', '.join(CARDS)}")
        self.recipe, self.num_gpus, self.gpu_name, self.mfu = recipe, num_gpus, gpu_name, mfu
        self.stage = stage_of(recipe, where)
        with torch.device("meta"):
            model = Emma(recipe.model)
        self.parts = parts_of(model, self.stage)
        self.stored, self.trained = sum(p.stored for p in self.parts), sum(p.trained for p in self.parts)
        self.sizes = sizes_of(model, self.stage, makes_images(recipe))
        self.units = self.sizes.units
        self.autoencoder, self.encoder_config, self.has_autoencoder = autoencoder_of(recipe)
        self.loads = [load_of(recipe, phase) for phase in phases(recipe)]

    @property
    def phase_steps(self) -> list[int]:
        """Steps of each phase; the last lasts until train.steps."""
        left, lengths = self.recipe.train.steps, []
        for load in self.loads[:-1]:
            lengths.append(min(load.phase.steps, left))
            left -= lengths[-1]
        return [*lengths, left]

    @property
    def encoder_layers(self) -> int:
        """Layers of the vision encoder that a gradient passes through."""
        v, trains = self.recipe.model.vision, self.stage.trainable
        return v.num_layers if "vision" in trains else v.expert_layers if "stem_expert" in trains else 0

    def memory(self, load: Load, world: int, tokens: float) -> Memory:
        """Bytes on one of `world` GPUs for a pack of `tokens` tokens with the mean composition of the phase.

        What an engine keeps is told in plan/state.py. Activations are what autograd keeps with flash-like attention and
        no padding, in bytes per layer and token:

            decoder  trained             8H + 4bH + (4+b)(Q+K) + 4bQ + 4bM + s
                     frozen, gradient    8H       +    4 (Q+K) + 4bQ + 3bM + s      s = 4 (2 + 2 heads + kv_heads)
            encoder  trained             9bh + 2bm + 4 heads + 16;  0 below everything that trains

        where b is the bytes of a value, H hidden, Q and K the widths of queries and keys, M the MLP (h, m: encoder).
        Norms keep an fp32 copy; K and V are repeated to all query heads. Backward works on one layer at a time, in as
        much again as that layer keeps. A layer that engine.activation_checkpointing has computed again keeps its input,
        bH or bh, and the rest only in its turn. Logits are held for a few rows at a time, twice in fp32; the LM head's
        gradient, summed in fp32, is no larger than the root's on their way later.
        """
        recipe, trains = self.recipe, self.stage.trainable
        v, d = recipe.model.vision, recipe.model.decoder
        b = 2 if recipe.engine.precision == "bf16" else 4
        share, own = tokens / load.tokens, tokens / recipe.engine.sequence_parallel
        patches = share * load.total(lambda s: s.seen) * v.shuffle**2
        supervised = share * load.total(lambda s: s.supervised)
        decodes, mode = self.stage.loss == "tokens", recipe.engine.activation_checkpointing
        again = decodes and mode != "none"
        query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
        scalars = 4 * (2 + 2 * d.heads + d.kv_heads)
        of_decoder = 8 * d.hidden + 4 * (query + key) + 4 * b * query + 3 * b * d.intermediate_size + scalars
        if "decoder" in trains:
            of_decoder += b * (4 * d.hidden + query + key + d.intermediate_size)
        of_encoder = 9 * b * v.hidden + 2 * b * v.intermediate_size + 4 * v.heads + 16

        def of_stack(layers: int, of_layer: int, hidden: int) -> int:
            inputs = len(checkpointed_layers(layers, mode))
            return (layers - inputs) * of_layer + inputs * b * hidden

        kept = {
            **state_memory(recipe, self.sizes, world),
            "autoencoder, fp32 copy": 4 * self.autoencoder,
            "decoder's activations": decodes * own * of_stack(d.num_layers, of_decoder, d.hidden),
            "encoder's activations": patches * of_stack(self.encoder_layers, of_encoder, v.hidden),
            "one layer's backward": (1 + again) * max(decodes * own * of_decoder, patches * of_encoder),
            "logits": 8 * decodes * min(ROWS, supervised) * d.vocab,
        }
        return Memory(kept, self._encoding(load, share) if decodes else 0.0)

    def _encoding(self, load: Load, share: float) -> float:
        """Bytes of three of the autoencoder's largest feature maps, fp32, of as many images as it encodes at once."""
        channels = self.encoder_config["encoder_block_out_channels"]
        full_size = self.encoder_config["encoder_layers_per_block"][0] > 0
        most = 0.0
        for task, mean in load.means.items():
            images = mean.images_seen + (mean.made > 0)
            at_once = min(self.recipe.model.autoencoder.chunk, share * load.samples[task] * images)
            most = max(most, at_once * (mean.seen + mean.made) / max(images, 1.0))
        per_pixel = channels[0] if full_size else channels[1] / 4
        return 3 * 4 * per_pixel * most * self.recipe.model.autoencoder.pixels**2

    def flops(self, load: Load) -> dict[str, int]:
        """Useful FLOPs of one optimizer step over all GPUs by module."""
        return module_flops(self.recipe.model, self.stage.trainable, self._work(load), self.stage.loss == "router")

    def repeated_flops(self, load: Load) -> float:
        """FLOPs of one step that backward computes a second time, over all GPUs: checkpointed layers and logits."""
        if self.stage.loss == "router":
            return 0
        v, d, mode = self.recipe.model.vision, self.recipe.model.decoder, self.recipe.engine.activation_checkpointing
        work = self._work(load)
        forward = module_flops(self.recipe.model, (), replace(work, logits=0))
        of_decoder, of_encoder = forward["Und branch"] + forward["Gen branch"], forward["vision encoder"]
        again = of_decoder * len(checkpointed_layers(d.num_layers, mode)) / d.num_layers
        again += of_encoder * len(checkpointed_layers(self.encoder_layers, mode)) / v.num_layers
        return again + 2 * work.logits * d.vocab * d.hidden

    def _work(self, load: Load) -> Work:
        """Work of one step from its mean samples: what `pack_work` counts in the packs of such samples.

        Means stand for the samples: pairs, which are quadratic in a sample's length, come out too low where lengths
        differ.
        """
        shuffle = self.recipe.model.vision.shuffle
        gen = load.total(lambda s: s.seen + s.made, "t2i", "it2i")
        # Causal rows see half their sample; an instruction sees its reference, a target all that is before it.
        und_pairs = load.total(lambda s: s.tokens * (s.tokens + 1) / 2, "i2t")
        und_pairs += load.total(lambda s: s.text * (s.text + 1) / 2 + s.text * s.seen, "t2i", "it2i")
        return Work(
            patches=load.total(lambda s: s.seen * shuffle**2),
            patch_pairs=load.total(lambda s: (s.seen * shuffle**2) ** 2 / max(1.0, s.images_seen)),
            und_visual=load.total(lambda s: s.seen, "i2t"),
            gen_visual=gen,
            und_rows=load.tokens - gen,
            und_pairs=und_pairs,
            gen_pairs=load.total(lambda s: s.seen**2 / max(1.0, s.images_seen) + s.made * s.tokens, "t2i", "it2i"),
            logits=load.total(lambda s: s.supervised),
        )

    def encoding_flops(self, load: Load) -> int:
        """FLOPs of one step's DC-AE encodings, over all GPUs; router tuning needs none."""
        if self.stage.loss == "router":
            return 0
        config, blocks = self.encoder_config, self.encoder_config["encoder_block_out_channels"]
        types = config["encoder_block_types"]
        return autoencoder_flops(
            blocks,
            config["encoder_layers_per_block"],
            [types] * len(blocks) if isinstance(types, str) else types,
            config["encoder_qkv_multiscales"],
            self.recipe.model.autoencoder.channels,
            round(load.total(lambda s: s.seen + s.made) * self.recipe.model.autoencoder.pixels**2),
            head_dim=config["attention_head_dim"],
            pixel_unshuffle=config["downsample_block_type"] == "pixel_unshuffle",
        )

    def seconds(self, load: Load) -> float:
        """Estimated time of one optimizer step."""
        work = sum(self.flops(load).values()) + self.repeated_flops(load) + TF32_COST * self.encoding_flops(load)
        return work / (self.num_gpus * CARDS[self.gpu_name][1] * self.mfu)

    def peak(self, world: int, tokens: float) -> float:
        """Bytes on one of `world` GPUs for a pack of `tokens` tokens, in the phase that needs most."""
        return max(self.memory(load, world, tokens).peak for load in self.loads)

    def problems(self) -> list[str]:
        """Why the recipe cannot run on these GPUs, and what would; empty if it can."""
        slots, cap, found = self.recipe.data.slots, self.recipe.data.pack_tokens, []
        ranks, copies = self.recipe.engine.sequence_parallel, self.recipe.engine.replicate
        shares = [n * ranks for n in range(1, slots + 1) if slots % n == 0 and n * ranks % copies == 0]
        if self.num_gpus not in shares:
            below, above = [n for n in shares if n < self.num_gpus], [n for n in shares if n > self.num_gpus]
            fits = " or ".join(str(n) for n in (*below[-1:], *above[:1]))
            how = f", {ranks} to a pack" * (ranks > 1) + f", in {copies} replicas" * (copies > 1)
            found.append(f"{self.num_gpus} GPUs cannot share data.slots={slots} evenly{how}; {fits} can")
        for load in self.loads:
            if (mean := load.tokens / slots) > cap:
                found.append(
                    f"phase {load.phase.name} packs {mean:,.0f} tokens on average, more than data.pack_tokens={cap}; "
                    "raise it or data.slots, or lower data.samples_per_step"
                )
        room, needed = usable(self.gpu_name), self.peak(self.num_gpus, cap)
        if needed > room:
            ways = [f"{n} GPUs" for n in shares if n > self.num_gpus and self.peak(n, cap) <= room][:1]
            shorter = (cap * part // 16 for part in range(15, 0, -1))
            ways += [
                f"data.pack_tokens={n} (fewer samples a step, or more slots)"
                for n in shorter
                if self.peak(self.num_gpus, n) <= room
            ][:1]
            larger = sorted(usable(name) for name in CARDS if usable(name) >= needed)
            ways += [f"{self.num_gpus} x {name}" for name in CARDS if usable(name) in larger[:1]][:1]
            advice = ", or ".join(ways) or "only more GPUs, larger ones and shorter packs together"
            found.append(
                f"a full pack needs {needed / GIB:.1f} GiB, a {self.gpu_name} has {room / GIB:.1f}; "
                f"what would fit: {advice}"
            )
        return found


def parts_of(model: Emma, stage: Stage) -> list[Part]:
    """The model's parameters by part; the autoencoder is not among them."""
    stored: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        stored[part] = stored.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + parameter.numel() * (group_of(name) in stage.trainable)
    return [Part(name, stored[name], trained[name]) for name in PARTS if name in stored]


def sizes_of(model: Emma, stage: Stage, generates: bool) -> Sizes:
    """What engines divide; `generates`: whether the Gen branch ever runs."""
    freeze(model, stage.trainable)
    units = [dict(unit.named_parameters()) for unit in (model.vision, *model.decoder.layers)]
    rests = [{n: p for n, p in unit.items() if n.startswith("gen.") and not generates} for unit in units]
    frozen = [unit for unit in units if not any(p.requires_grad for p in unit.values())]
    return Sizes(
        stored=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=tuple(sorted(_count(unit) - _count(rest) for unit, rest in zip(units, rests, strict=True))),
        frozen_units=sum(map(_count, frozen)),
        resting=sum(map(_count, rests)),
    )


def autoencoder_of(recipe: Recipe) -> tuple[int, dict[str, Any], bool]:
    """(parameters, diffusers config, whether its folder is there)."""
    path = Path(recipe.model.autoencoder.path) / "config.json"
    if not path.is_file():
        return DC_AE_PARAMETERS, DC_AE_F32C32, False
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        model = AutoencoderDC.from_config(json.loads(path.read_text()))
    return sum(p.numel() for p in model.parameters()), dict(model.config), True


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values())


def usable(gpu_name: str) -> float:
    """Bytes of a card that a plan may spend."""
    return CARDS[gpu_name][0] * GIB * (1 - RESERVE)


def _part_of(name: str) -> str:
    words = name.split(".")
    if words[0] == "decoder":
        if words[1] in ("embed_tokens", "lm_head"):
            return "embedding and LM head"
        owner = words[3] if words[1] == "layers" else words[2]
    else:
        owner = group_of(name)
    return list(PARTS)[1 + OWNERS.index(owner)]
