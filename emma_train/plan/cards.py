"""Kinds of GPU that a plan knows: memory and peak speed."""

from emma_train.errors import UserError
from emma_train.flops.formulas import PEAK_DENSE_BF16

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
MEMORY_BYTES_S: dict[str, float] = {
    "a100-40g": 1.555e12,
    "a100-80g": 2.039e12,
    "b200-192g": 8.0e12,
    "h100-80g": 3.35e12,
    "h100-nvl-94g": 3.9e12,
    "h100-pcie-80g": 2.0e12,
    "h200-141g": 4.8e12,
    "l40s-48g": 0.864e12,
    "mi300x-192g": 5.3e12,
    "rtx4090-24g": 1.008e12,
}
"""Peak bytes a second of a card's memory, by vendors' data sheets."""
WITHOUT_FP8 = ("a100-40g", "a100-80g", "mi300x-192g")
"""Kinds that engine.fp8 refuses (engine/fp8.py)."""
RESERVE = 0.10
"""Share of the card left to the CUDA context, NCCL and fragmentation."""


NVLINK: dict[str, float] = {
    "a100": 240e9,
    "h100": 360e9,
    "h100-nvl": 240e9,
    "h200": 360e9,
    "b200": 720e9,
}
"""Bytes a second that a GPU of a node sends in a ring to the next: four fifths of NVLink's peak in one direction, by
vendors' data sheets, not measured. Cards that are not listed have PCIe."""
PCIE = 25e9


def card_name(name: str) -> str:
    """The full name of a kind of GPU, given by its name or by the beginning of one. Raises UserError."""
    matches = [name] if name in CARDS else [known for known in CARDS if known.startswith(name)]
    if len(matches) != 1:
        what = f"may be {' or '.join(matches)}" if matches else f"not a known kind of GPU; known are {', '.join(CARDS)}"
        raise UserError(f"--gpu {name}: {what}")
    return matches[0]


def node_bandwidth(gpu_name: str) -> float:
    """Bytes a second between the GPUs of a node, in one direction for each."""
    return NVLINK.get(gpu_name.rsplit("-", 1)[0], PCIE)


def usable_bytes(gpu_name: str) -> float:
    """Bytes of a card that a plan may use."""
    return CARDS[gpu_name][0] * GIB * (1 - RESERVE)
