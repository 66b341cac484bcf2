"""FLOPs of a step, module by module and aware of what is frozen, and the share of the card's peak that they are (MFU).

One multiply-accumulate is 2 FLOPs. A matrix product costs 2·MACs forward, 2·MACs more where a gradient flows to its
input, and 2·MACs more where its weight is trained: so 6·N·T for a network of N weights that trains on T tokens, 4·N·T
where it is frozen but something before it trains, 2·N·T where nothing at or before it trains. Norms, activations and
softmax are left out, as is usual, and so is what activation checkpointing computes twice: MFU counts useful work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Dense bf16 tensor-core peaks in FLOP/s. Vendors' headline figures with structured sparsity are twice these.
PEAK_DENSE_BF16: dict[str, float] = {
    "A100": 312e12,
    "H100 SXM": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307.4e12,
}


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one attention layer in its forward pass."""

    into_attention: int
    """For a token: the projections to queries, keys and values."""
    after_attention: int
    """For a token: the output projection and the MLP."""
    per_pair: int
    """For a (query, key) pair: scores and values."""

    @property
    def per_token(self) -> int:
        return self.into_attention + self.after_attention


def decoder_layer_macs(hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> LayerMacs:
    """One branch of a decoder layer: grouped-query attention and SwiGLU."""
    query, key_value = heads * head_dim, kv_heads * head_dim
    return LayerMacs(hidden * (query + 2 * key_value), query * hidden + 3 * hidden * mlp, 2 * query)


def vision_layer_macs(hidden: int, mlp: int) -> LayerMacs:
    """A layer of the vision encoder; its tokens are patches."""
    return LayerMacs(3 * hidden * hidden, hidden * hidden + 2 * hidden * mlp, 2 * hidden)


def linear_flops(in_features: int, out_features: int, num_tokens: int, trainable: bool, needs_input_grad: bool) -> int:
    """FLOPs of one linear layer over `num_tokens` tokens, forward and the parts of backward that are needed."""
    return _passes(in_features * out_features * num_tokens, trainable, needs_input_grad)


def newton_schulz_flops(rows: int, columns: int, iterations: int) -> int:
    """FLOPs of orthogonalising a matrix: per iteration the products XX' (short x long x short), (XX')² (short³) and one
    of both with X (short x short x long), in full, as they are computed (engine/muon.py)."""
    short, long = min(rows, columns), max(rows, columns)
    return iterations * (4 * short**2 * long + 2 * short**3)


def decoder_flops(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp: int,
    vocab: int,
    num_tokens: int,
    attention_pairs: int,
    num_logit_tokens: int,
    trainable: bool,
    needs_input_grad: bool,
) -> int:
    """FLOPs of one branch of the decoder (SwiGLU, grouped-query attention) and its LM head.

    num_tokens: tokens that take this branch. attention_pairs: (query, key) pairs that the mask allows, with this
    branch's queries, per layer. num_logit_tokens: positions whose logits are computed. needs_input_grad: something
    before the decoder trains (an adapter, the vision encoder, the embeddings). The two branches are two calls.
    """
    layer = decoder_layer_macs(hidden, heads, kv_heads, head_dim, mlp)
    stack = _stack(layer, layers, num_tokens, attention_pairs, trainable, needs_input_grad)
    return stack + _passes(hidden * vocab * num_logit_tokens, trainable, trainable or needs_input_grad)


def vision_flops(
    hidden: int,
    layers: int,
    mlp: int,
    patch_features: int,
    num_patches: int,
    attention_pairs: int,
    trainable: bool,
    needs_input_grad: bool = False,
) -> int:
    """FLOPs of a vision transformer. patch_features: values in a patch (3·16·16), 0 for a part without embedding.

    attention_pairs: the sum over images of patches². A part of the encoder (shared layers, one expert) is one call.
    """
    embedding = _passes(patch_features * hidden * num_patches, trainable, False)
    input_grad = needs_input_grad or (trainable and patch_features > 0)
    layer = vision_layer_macs(hidden, mlp)
    return embedding + _stack(layer, layers, num_patches, attention_pairs, trainable, input_grad)


def adapter_flops(
    in_features: int, hidden: int, out_features: int, num_tokens: int, trainable: bool, needs_input_grad: bool
) -> int:
    """FLOPs of a two-layer MLP adapter over `num_tokens` visual tokens."""
    first = linear_flops(in_features, hidden, num_tokens, trainable, needs_input_grad)
    return first + linear_flops(hidden, out_features, num_tokens, trainable, trainable or needs_input_grad)


def autoencoder_flops(
    block_channels: Sequence[int],
    layers_per_block: Sequence[int],
    block_types: Sequence[str],
    qkv_multiscales: Sequence[Sequence[int]],
    latent_channels: int,
    pixels: int,
    head_dim: int = 32,
    pixel_unshuffle: bool = True,
) -> int:
    """FLOPs of DC-AE's encoder, which never trains: forward only. Arguments as in diffusers' `AutoencoderDC`.

    pixels: height·width summed over the images. block_types: "ResBlock" or "EfficientViTBlock" per block.
    """

    def down(channels: int, following: int, positions: int) -> int:
        # pixel_unshuffle convolves at full size to a quarter of the channels; a strided convolution costs the same.
        width, size = (following // 4, positions) if pixel_unshuffle else (following, positions // 4)
        return 9 * channels * width * size

    positions = pixels
    if layers_per_block[0] > 0:
        macs = 9 * 3 * block_channels[0] * positions
    else:
        macs = down(3, block_channels[1], positions)
        positions //= 4
    for i, (channels, layers) in enumerate(zip(block_channels, layers_per_block, strict=True)):
        if layers == 0:
            continue
        if block_types[i] == "ResBlock":
            macs += layers * 2 * 9 * channels * channels * positions
        else:
            macs += layers * _efficient_vit_macs(channels, head_dim, qkv_multiscales[i]) * positions
        if i + 1 < len(block_channels):
            macs += down(channels, block_channels[i + 1], positions)
            positions //= 4
    return 2 * (macs + 9 * block_channels[-1] * latent_channels * positions)


def mfu(flops: float, seconds: float, num_gpus: int, device_name: str) -> float | None:
    """Model FLOPs utilisation in [0, 1]: `flops` of the whole step, over all GPUs, against the dense bf16 peak.

    None on a card whose peak is not known (see `peak_flops`) and where no time has passed: no number beats a wrong one.
    """
    peak = peak_flops(device_name)
    if peak is None or seconds <= 0 or num_gpus < 1:
        return None
    return flops / (seconds * num_gpus * peak)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a card by the name that its driver gives ("NVIDIA H100 80GB HBM3"), else None."""
    name = device_name.upper().replace("-", " ").replace("_", " ")
    words = name.split()
    if "H100" in words:
        for kind in ("PCIe", "NVL"):
            if kind.upper() in words:
                return PEAK_DENSE_BF16[f"H100 {kind}"]
        return PEAK_DENSE_BF16["H100 SXM"] if "HBM3" in words or "SXM" in name else None
    if "RTX 4090" in name:  # the laptop and "D" cards of this name are slower
        return None if "LAPTOP" in words or "RTX 4090 D" in name else PEAK_DENSE_BF16["RTX 4090"]
    return next((PEAK_DENSE_BF16[word] for word in words if word in PEAK_DENSE_BF16), None)


def _passes(macs: int, trainable: bool, needs_input_grad: bool) -> int:
    return 2 * macs * (1 + int(needs_input_grad) + int(trainable))


def _stack(
    layer: LayerMacs, num_layers: int, num_tokens: int, pairs: int, trainable: bool, needs_input_grad: bool
) -> int:
    """FLOPs of `num_layers` equal attention layers over tokens and (query, key) pairs."""
    if num_layers == 0:
        return 0
    flows = trainable or needs_input_grad
    products = _passes(layer.per_token * num_tokens, trainable, flows)
    # Scores and values have no weights. Backward is two products for each one of the forward pass, as both operands
    # are activations.
    mixing = _passes(layer.per_pair * pairs, flows, flows)
    # The gradient of the first layer's input is not needed if nothing before it trains.
    not_needed = 2 * layer.into_attention * num_tokens if flows and not needs_input_grad else 0
    return num_layers * (products + mixing) - not_needed


def _efficient_vit_macs(channels: int, head_dim: int, kernels: Sequence[int]) -> int:
    """MACs per position of multi-scale linear attention and the gated depthwise MLP (expansion 4) after it."""
    heads = channels // head_dim
    inner = heads * head_dim
    groups = 1 + len(kernels)
    projections = 3 * channels * inner + inner * groups * channels
    multiscale = sum(3 * inner * kernel * kernel + 3 * inner * head_dim for kernel in kernels)
    attention = groups * heads * 2 * head_dim * (head_dim + 1)
    gated = channels * 8 * channels + 9 * 8 * channels + 4 * channels * channels
    return projections + multiscale + attention + gated
