"""What a step used: memory of this rank, FLOPs by module and what is trained, and the share of the card's peak."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emma_train.config.schema import Recipe
from emma_train.flops.formulas import adapter_flops, decoder_flops, mfu, peak_flops, vision_flops
from emma_train.sequence.layout import Role
from emma_train.sequence.pack import PackedBatch
from emma_train.stages.stage import Stage


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_mfu(
    recipe: Recipe, stage: Stage, packs: Sequence[PackedBatch], seconds: float, device: torch.device, num_cards: int = 1
) -> float | None:
    """Model FLOPs of this rank's packs over the dense peak of the cards that share them; None on a CPU or an unknown
    card."""
    if device.type != "cuda" or peak_flops(name := torch.cuda.get_device_name(device)) is None:
        return None
    done = sum(sum(module_flops(recipe, stage, pack_work(recipe, batch)).values()) for batch in packs)
    return mfu(done, seconds, num_cards, name)


@dataclass(frozen=True)
class Work:
    """What passes through the modules: rows of a matrix product, or (query, key) pairs of attention."""

    patches: float
    """Patches that the vision encoder sees."""
    patch_pairs: float
    """The sum over those images of patches²."""
    und_visual: float
    """Tokens of understanding images."""
    gen_visual: float
    """Tokens of reference and target images."""
    und_rows: float
    """Tokens of the Und branch."""
    und_pairs: float
    """Keys that they see, in sum."""
    gen_pairs: float
    """Keys that the tokens of the Gen branch see, in sum."""
    logits: float
    """Supervised text tokens."""


def pack_work(recipe: Recipe, batch: PackedBatch) -> Work:
    """The work of one pack; exact, because a token sees its limit + 1 keys."""
    seen = [*batch.grids[Role.UND], *batch.grids[Role.REFERENCE]]
    patches = [rows * columns * recipe.model.vision.shuffle**2 for rows, columns in seen]
    keys = (batch.limit + 1).tolist()
    return Work(
        patches=sum(patches),
        patch_pairs=sum(n * n for n in patches),
        und_visual=batch.counts[1],
        gen_visual=batch.counts[2] + batch.counts[3],
        und_rows=batch.num_und,
        und_pairs=sum(keys[: batch.num_und]),
        gen_pairs=sum(keys[batch.num_und :]),
        logits=len(batch.labels),
    )


def module_flops(recipe: Recipe, stage: Stage, work: Work) -> dict[str, int]:
    """Useful FLOPs by module: forward, and the backward that the stage's trainable groups need."""
    v, d, trains = recipe.model.vision, recipe.model.decoder, stage.trainable
    pixels: dict[str, Any] = {
        "hidden": v.hidden,
        "mlp": v.intermediate_size,
        "num_patches": round(work.patches),
        "attention_pairs": round(work.patch_pairs),
    }
    shared, embedding = v.num_layers - v.expert_layers, 3 * v.patch**2
    encoder = vision_flops(**pixels, layers=shared, patch_features=embedding, trainable="vision" in trains)
    if stage.loss == "router":
        return {"vision encoder": encoder}
    encoder_trains = "vision" in trains or "stem_expert" in trains
    encoder += vision_flops(
        **pixels,
        layers=v.expert_layers,
        patch_features=0,
        trainable=encoder_trains,
        needs_input_grad="vision" in trains,
    )
    semantic = v.shuffle**2 * v.hidden + recipe.model.autoencoder.channels
    adapters = sum(
        adapter_flops(semantic, d.hidden, d.hidden, round(rows), name in trains, encoder_trains)
        for rows, name in ((work.und_visual, "und_adapter"), (work.gen_visual, "gen_adapter"))
    )
    below_trains = encoder_trains or "und_adapter" in trains or "gen_adapter" in trains
    und, gen = (
        decoder_flops(
            hidden=d.hidden,
            layers=d.num_layers,
            heads=d.heads,
            kv_heads=d.kv_heads,
            head_dim=d.head_dim,
            mlp=d.intermediate_size,
            vocab=d.vocab,
            num_tokens=round(rows),
            attention_pairs=round(pairs),
            num_logit_tokens=round(logits),
            trainable="decoder" in trains,
            needs_input_grad=below_trains,
        )
        for rows, pairs, logits in (
            (work.und_rows, work.und_pairs, work.logits),
            (work.gen_visual, work.gen_pairs, 0.0),
        )
    )
    return {"vision encoder": encoder, "adapters": adapters, "Und branch": und, "Gen branch": gen}
