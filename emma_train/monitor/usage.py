"""What a step used: memory of this rank, and its share of the card's peak arithmetic."""

import resource
from collections.abc import Collection, Sequence

import torch

from emma_train.config.schema import Recipe
from emma_train.monitor.flops import adapter_flops, decoder_flops, mfu, peak_flops, vision_flops
from emma_train.sequence.layout import Role
from emma_train.sequence.pack import PackedBatch


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_mfu(
    recipe: Recipe, trainable: Collection[str], packs: Sequence[PackedBatch], seconds: float, device: torch.device
) -> float | None:
    """Model FLOPs of this rank's packs over the dense peak of its card; None on a CPU or an unknown card."""
    if device.type != "cuda" or peak_flops(name := torch.cuda.get_device_name(device)) is None:
        return None
    return mfu(sum(pack_flops(recipe, trainable, batch) for batch in packs), seconds, 1, name)


def pack_flops(recipe: Recipe, trainable: Collection[str], batch: PackedBatch) -> int:
    """Useful FLOPs of one pack, forward and backward, by what is trained and what a gradient passes through."""
    v, d = recipe.model.vision, recipe.model.decoder
    semantic = v.shuffle**2 * v.hidden
    seen = [*batch.grids[Role.UND], *batch.grids[Role.REFERENCE]]
    sizes = [rows * columns * v.shuffle**2 for rows, columns in seen]
    vision = "vision" in trainable or "stem_expert" in trainable
    adapters = vision or "und_adapter" in trainable or "gen_adapter" in trainable
    total = vision_flops(
        hidden=v.hidden,
        layers=v.layers,
        mlp=v.mlp,
        patch_features=3 * v.patch**2,
        num_patches=sum(sizes),
        attention_pairs=sum(n * n for n in sizes),
        trainable="vision" in trainable,
    )
    num_text, num_und, num_reference, num_target = batch.counts
    for tokens, name in ((num_und, "und_adapter"), (num_reference + num_target, "gen_adapter")):
        total += adapter_flops(
            semantic + recipe.model.autoencoder.channels, d.hidden, d.hidden, tokens, name in trainable, vision
        )
    pairs = (batch.limit + 1).tolist()
    for start, stop, logits in (
        (0, batch.num_und, len(batch.labels)),
        (batch.num_und, batch.num_tokens, 0),
    ):
        total += decoder_flops(
            hidden=d.hidden,
            layers=d.layers,
            heads=d.heads,
            kv_heads=d.kv_heads,
            head_dim=d.head_dim,
            mlp=d.mlp,
            vocab=d.vocab,
            num_tokens=stop - start,
            attention_pairs=sum(pairs[start:stop]),
            num_logit_tokens=logits,
            trainable="decoder" in trainable,
            needs_input_grad=adapters,
        )
    return total
