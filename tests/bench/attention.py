"""Time of attention, forward and backward, over packs of EMMA's three tasks by every backend that runs here.

    python tests/bench/attention.py [--json] [--out DIR] [--packs mixed] [--tokens 4096 ...] [--side 16]

dense is one mask over the whole pack, sdpa one per sample, spans two calls of variable length, flex FlexAttention (CUDA
only: its backward refuses a CPU). On a CPU the spans go run by run. Ratios are to dense. encoder is that of the vision
encoder, images of one size: as the model computes it, and as a batch by torch's own kernels.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from emma_train.model.attention import AttentionPlan, MaskPlan, attention, build_plan, hybrid_mask, prepare_masks
from emma_train.model.varlen import find_kernel
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack
from emma_train.sequence.spans import full_call
from emma_train.training.environment import commit

DENSE_TOKENS = 16384
"""On a GPU, longer packs have no dense mask."""


def sample(task: str, key: str, side: int) -> Sample:
    """i2t: image, question and answer; t2i: prompt and target; it2i: reference, instruction and target."""
    patches, latent = torch.zeros(side**2 * 4, 768, dtype=torch.uint8), torch.zeros(side**2, 32)
    image = ImageTokens((side, side), patches.numpy(), latent.numpy())
    segments: dict[str, list[Segment]] = {
        "i2t": [_text(8), ImageSegment("a", ImageRole.UND), _text(184)],
        "t2i": [_text(64), ImageSegment("a", ImageRole.TARGET)],
        "it2i": [_text(8), ImageSegment("a", ImageRole.REFERENCE), _text(56), ImageSegment("b", ImageRole.TARGET)],
    }
    return Sample(key, task, segments[task], {"a": image, "b": image})


def packs(tokens: int, side: int) -> dict[str, PackedBatch]:
    """One pack per task and one of all tasks, of about `tokens` tokens."""
    mixes = {"i2t": ["i2t"], "t2i": ["t2i"], "it2i": ["it2i"], "mixed": ["i2t", "t2i", "it2i"]}
    made = {}
    for name, tasks in mixes.items():
        size = sum(sample(task, "", side).num_tokens for task in tasks)
        made[name] = pack([sample(task, f"{task}{i}", side) for i in range(max(1, tokens // size)) for task in tasks])
    return made


def dense(batch: PackedBatch) -> AttentionPlan:
    return MaskPlan(hybrid_mask(batch))


def measure(
    batch: PackedBatch, plan: Callable[[], AttentionPlan], shape: tuple[int, int, int], dtype: torch.dtype
) -> float:
    """Milliseconds of forward and backward."""
    heads, kv_heads, dim = shape
    device = batch.sample.device
    q, k, v = (
        torch.randn(batch.num_tokens, num, dim, device=device, dtype=dtype, requires_grad=True)
        for num in (heads, kv_heads, kv_heads)
    )
    weight = torch.randn(batch.num_tokens, heads, dim, device=device, dtype=dtype)
    prepared = plan()
    return milliseconds(lambda: attention(q, k, v, prepared) * weight, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object")
    parser.add_argument("--out", type=Path, help="folder for the results, as JSON and as Markdown")
    parser.add_argument("--packs", nargs="+", default=list(packs(1, 1)), help="i2t, t2i, it2i, mixed; default all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="tokens of a pack")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--side", type=int, default=16, help="visual tokens on the side of an image: 16 for 512 pixels")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    results: dict[str, float] = {}
    for tokens in args.tokens:
        for name in args.packs:
            batch = packs(tokens, args.side)[name].to(device)
            results |= compare(batch, f"{name}_{tokens}", (args.heads, args.kv_heads, args.dim), device)
            if args.out:  # at once, should the time run out
                write(args.out, facts, results)
    results |= encoder(8 if device.type == "cuda" else 1, device)
    if args.out:
        write(args.out, facts, results)
    if args.json:
        print(json.dumps({**facts, **results}))
        return
    for key, value in {**facts, **results}.items():
        print(f"{key:28} {value}")


def compare(batch: PackedBatch, name: str, shape: tuple[int, int, int], device: torch.device) -> dict[str, float]:
    """Milliseconds of every form, and their ratios to the dense one where that fits."""
    forms: dict[str, Callable[[], AttentionPlan]] = {
        "dense": partial(dense, batch),
        "sdpa": partial(prepare_masks, batch),
        "spans": partial(build_plan, batch, None, "flash"),
    }
    if device.type == "cuda":
        forms["flex"] = partial(build_plan, batch, None, "flex")
        if batch.num_tokens > DENSE_TOKENS:
            del forms["dense"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    taken = {form: measure(batch, plan, shape, dtype) for form, plan in forms.items()}
    base = "dense" if "dense" in taken else "sdpa"
    ratios = {f"{name}_{form}_vs_{base}": round(ms / taken[base], 4) for form, ms in taken.items() if form != base}
    return {**{f"{name}_{form}_ms": ms for form, ms in taken.items()}, **ratios}


def encoder(images: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of attention over images of 1,024 patches, 16 heads of 72; NaN where a kernel refuses them."""
    patches, heads, dim = 1024, 16, 72
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (images * patches, heads, dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv")
    call = full_call([patches] * images, device)

    def batched() -> torch.Tensor:
        queries, keys, values = (x.view(images, patches, heads, dim).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(queries, keys, values)

    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else (SDPBackend.MATH,)
    taken = {"encoder_as_in_the_model_ms": milliseconds(lambda: find_kernel(device, dim)(q, k, v, call), device)}
    for kernel in kernels:
        with sdpa_kernel(kernel):
            try:
                taken[f"encoder_{kernel.name.lower()}_ms"] = milliseconds(batched, device)
            except RuntimeError:
                taken[f"encoder_{kernel.name.lower()}_ms"] = math.nan
    return taken


def milliseconds(compute: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Of forward and backward: the median of five after one to warm up."""
    taken = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        compute().sum().backward()
        _wait(device)
        taken.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(taken[1:]), 2)


def write(out: Path, facts: dict[str, Any], results: dict[str, float]) -> None:
    """Write what is measured so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention").with_suffix(".json").write_text(json.dumps({**facts, **results}, indent=1) + "\n")
    lines = ["# Attention, forward and backward", "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in results.items())]
    (out / "attention").with_suffix(".md").write_text("\n".join(lines) + "\n")


def _text(length: int) -> TextSegment:
    return TextSegment(tuple(range(length)), False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
