"""Work of a pack, the FLOPs of it by module, and the share of the card's peak that a step reaches (MFU)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emma_train.config.schema import ModelConfig
from emma_train.flops.formulas import adapter_flops, decoder_flops, mfu, peak_flops, vision_flops
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import PackedBatch


@dataclass(frozen=True)
class Work:
    """What passes through the modules: rows of a matrix product, or (query, key) pairs of attention.

    Integers for a pack; means, and so fractions, in a plan.
    """

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
    """Sum over the tokens of the Und branch of the keys that each attends to."""
    gen_pairs: float
    """The same for the Gen branch."""
    logits: float
    """Supervised text tokens."""


def pack_work(batch: PackedBatch, shuffle: int) -> Work:
    """Work of one pack; exact, because a token attends to `limit` + 1 keys. A visual token has shuffle² patches."""
    seen = [*batch.grids[ImageRole.UND], *batch.grids[ImageRole.REFERENCE]]
    patches = [rows * columns * shuffle**2 for rows, columns in seen]
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


def module_flops(
    model: ModelConfig, trainable: Collection[str], work: Work, encoder_only: bool = False
) -> dict[str, int]:
    """Useful FLOPs by module: forward, and the backward that the trainable parameter groups need.

    trainable: names of groups as in stages/stage.py. encoder_only: router tuning, which runs only the vision encoder's
    shared layers. Not counted: the autoencoder (see formulas.autoencoder_flops), and the velocity head and the time
    embedding, which are negligible.
    """
    v, d = model.vision, model.decoder
    encoded = model.fusion != "latent"
    images: dict[str, Any] = {
        "hidden": v.hidden,
        "mlp": v.intermediate_size,
        "num_patches": encoded * round(work.patches),
        "attention_pairs": encoded * round(work.patch_pairs),
    }
    shared, patch_features = v.num_used_layers - v.expert_layers, 3 * v.patch**2
    encoder = vision_flops(**images, layers=shared, patch_features=patch_features, trainable="vision" in trainable)
    if encoder_only:
        return {"vision encoder": encoder}
    encoder_trains = "vision" in trainable or "stem_expert" in trainable
    encoder += vision_flops(
        **images,
        layers=v.expert_layers,
        patch_features=0,
        trainable=encoder_trains,
        needs_input_grad="vision" in trainable,
    )
    semantic = v.shuffle**2 * v.hidden + model.autoencoder.channels
    input_trains = encoder_trains or "und_adapter" in trainable or "gen_adapter" in trainable

    def adapter(name: str, num_tokens: float) -> int:
        return adapter_flops(semantic, d.hidden, d.hidden, round(num_tokens), name in trainable, encoder_trains)

    def branch(num_tokens: float, pairs: float, num_logit_tokens: float) -> int:
        return decoder_flops(
            hidden=d.hidden,
            layers=d.num_layers,
            heads=d.heads,
            kv_heads=d.kv_heads,
            head_dim=d.head_dim,
            mlp=d.intermediate_size,
            vocab=d.vocab,
            num_tokens=round(num_tokens),
            attention_pairs=round(pairs),
            num_logit_tokens=round(num_logit_tokens),
            trainable="decoder" in trainable,
            needs_input_grad=input_trains,
        )

    of_gen = "gen_adapter" if model.adapters == "two" else "und_adapter"
    return {
        "vision encoder": encoder,
        "adapters": adapter("und_adapter", work.und_visual) + adapter(of_gen, work.gen_visual),
        "Und branch": branch(work.und_rows, work.und_pairs, work.logits),
        "Gen branch": branch(work.gen_visual, work.gen_pairs, 0),
    }


def step_mfu(
    model: ModelConfig,
    trainable: Collection[str],
    packs: Sequence[PackedBatch],
    seconds: float,
    device: torch.device,
    num_cards: int = 1,
    encoder_only: bool = False,
) -> float | None:
    """FLOPs of this rank's packs over the dense bf16 peak of the `num_cards` cards that share them, in `seconds`.

    None on a CPU or a card whose peak is not known. Other arguments as in `module_flops`.
    """
    if device.type != "cuda" or peak_flops(name := torch.cuda.get_device_name(device)) is None:
        return None
    works = [pack_work(batch, model.vision.shuffle) for batch in packs]
    flops = sum(sum(module_flops(model, trainable, work, encoder_only).values()) for work in works)
    return mfu(flops, seconds, num_cards, name)
