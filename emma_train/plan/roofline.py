"""How long a GPU computes for a step: a stated model, part by part (docs/performance.md: beside one H100).

    matrix products    FLOPs at GEMM of the dense bf16 peak, with what backward computes again
    attention          FLOPs of scores and values at SHORT or LONG of the peak: short sequences, heads of 72 padded
    elementwise        bytes that norms, RoPE, SwiGLU and additions read and write, at ELEMENTWISE of the memory's peak
    cross-entropy      bytes of the logits' passes, likewise
    copies of FSDP     bytes copied out of gathered buffers and into those of gradients, at MEMORY of the memory's peak
    optimizer          bytes of AdamW, EMA and norm over a rank's shard, likewise, and Newton-Schulz as products
    autoencoder        FLOPs at AUTOENCODER of the TF32 peak, half that of bf16; none where all latents are cached

Bytes are those of every operator's inputs and outputs, counted on the meta device for layers of EMMA-4B (6,176 tokens:
eager 6.2 GB for a deep decoder layer, 2.5 of them in forward; after Inductor's fusion 3.8; a layer of the encoder 1.07
and 0.93 GB for 8,192 patches), per value of the layer's widths, so that they scale with the model. Not modelled: waits
of the host, launches of small kernels, uneven ranks, units whose exchange nothing hides, and what communication takes
from computing: so it is a best case.
"""

from dataclasses import replace

from emma_train.engine.activation_checkpointing import checkpointed_layers
from emma_train.flops.work import module_flops
from emma_train.plan.activations import value_bytes
from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import CARDS, MEMORY_BYTES_S
from emma_train.plan.exchange import exchange
from emma_train.plan.samples import StepLoad

GEMM = 0.75
SHORT, LONG = 0.13, 0.22
"""Attention with flash-attn 2, where the mean image has up to SHORT_PATCHES patches, and where it has more."""
SHORT_PATCHES = 1024
AUTOENCODER = 0.45
MEMORY = 0.8
ELEMENTWISE = 0.6
"""All but LONG and AUTOENCODER were measured on an H100, in steps of Stage 1 at full width (docs/performance.md)."""
DECODER_PASSES = {False: (11.1, 16.6), True: (6.0, 12.0)}
"""Times that each value of a decoder layer's widths is read or written, in forward and in backward; by whether layers
are compiled. Those of compiled layers are of the code that was measured on the H100; since then a deep one moves 3.55
GB, a shallow one 3.17 (tests/kernels.py)."""
ENCODER_PASSES = {False: (4.0, 8.0), True: (3.5, 7.0)}
LOGIT_BYTES = 183
"""Bytes moved for each logit of a supervised token, forward and backward."""


def step_seconds(plan: Plan, load: StepLoad) -> float:
    """Estimated time of one optimizer step without communication; at `plan.mfu` of the peak where that is known."""
    if plan.mfu:
        work = sum(plan.flops(load).values()) + plan.repeated_flops(load) + 2 * plan.encoding_flops(load)
        work += plan.num_gpus * max(plan.newton_schulz_loads())
        return work / (plan.num_gpus * _peak(plan) * plan.mfu)
    return sum(parts_of_step(plan, load).values())


def estimated_mfu(plan: Plan, load: StepLoad) -> float:
    """Useful FLOPs of a step over what the GPUs' peak would give in its time."""
    return sum(plan.flops(load).values()) / (plan.num_gpus * _peak(plan) * step_seconds(plan, load))


def parts_of_step(plan: Plan, load: StepLoad) -> dict[str, float]:
    """Estimated seconds of each part of one optimizer step on each GPU."""
    everything = plan.work(load)
    short = everything.patch_pairs <= SHORT_PATCHES * everything.patches
    work = replace(everything, patch_pairs=0, und_pairs=0, gen_pairs=0)
    products = sum(module_flops(plan.recipe.model, plan.stage.trainable, work, plan.stage.loss == "router").values())
    attention = sum(plan.flops(load).values()) - products
    peak, memory = plan.num_gpus * _peak(plan), plan.num_gpus * MEMORY_BYTES_S[plan.gpu_name]
    logits = LOGIT_BYTES * load.total(lambda s: s.supervised) * plan.recipe.model.decoder.vocab
    decodes = plan.stage.loss == "tokens"
    parts = {
        "matrix products": (products + plan.repeated_flops(load)) / (peak * GEMM),
        "attention": attention / (peak * (SHORT if short else LONG)),
        "elementwise": _elementwise_bytes(plan, load) / (memory * ELEMENTWISE),
        "cross-entropy": decodes * logits / (memory * ELEMENTWISE),
        "copies of FSDP": _copied_bytes(plan) * plan.num_gpus / (memory * MEMORY),
        "optimizer": _optimizer_bytes(plan) * plan.num_gpus / (memory * MEMORY)
        + max(plan.newton_schulz_loads()) / (_peak(plan) * GEMM),
        "autoencoder": plan.encoding_flops(load) / (peak / 2 * AUTOENCODER),
    }
    return {name: seconds for name, seconds in parts.items() if seconds}


def _peak(plan: Plan) -> float:
    return CARDS[plan.gpu_name][1]


def _elementwise_bytes(plan: Plan, load: StepLoad) -> float:
    """Of all GPUs. Layers that are computed again run their forward twice."""
    recipe, v, d = plan.recipe, plan.recipe.model.vision, plan.recipe.model.decoder
    b, mode, compiled = value_bytes(recipe.engine), recipe.engine.activation_checkpointing, recipe.engine.compile
    of_token = d.hidden + (d.heads + d.kv_heads) * d.head_dim + d.intermediate_size
    forward, backward = DECODER_PASSES[compiled]
    decodes = plan.stage.loss == "tokens"
    passes = decodes * (d.num_layers * (forward + backward) + len(checkpointed_layers(d.num_layers, mode)) * forward)
    decoder = load.tokens * b * of_token * passes
    forward, backward = ENCODER_PASSES[compiled]
    again = len(checkpointed_layers(plan.encoder_layers, mode)) * forward
    passes = v.num_used_layers * forward + plan.encoder_layers * backward + again
    return decoder + plan.work(load).patches * b * (v.hidden + v.intermediate_size) * passes


def _copied_bytes(plan: Plan) -> float:
    """Of one GPU: gathered values are read and written, gradients read in compute precision and written in fp32."""
    if plan.recipe.engine.kind != "fsdp":
        return 0.0
    sent = exchange(plan)
    return 2 * sent.gathered + sent.reduced / 4 * (value_bytes(plan.recipe.engine) + 4)


def _optimizer_bytes(plan: Plan) -> float:
    """Of one GPU: AdamW reads weight, gradient and moments and writes weight and moments; the norm reads the gradient;
    an EMA reads weight and average and writes the average."""
    engine = plan.recipe.engine
    shards = plan.num_gpus // engine.replicate if engine.kind == "fsdp" else plan.num_gpus
    return (28 + 4 + 12 * bool(plan.recipe.ema.decay)) * plan.sizes.trained / shards
