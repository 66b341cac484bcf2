"""What a step's kernels do, from torch's profiler."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

PARTS = {
    "attention": r"flash|fmha|attention|sdpa",
    "compiled elementwise": r"^triton_",
    "products": r"gemm|nvjet|cutlass|cublas|addmm|\bmm\b|\bbmm\b|scaled_mm",
    "optimizer": r"multi_tensor_apply|adam|lerp|foreach",
    "copies and exchange": r"nccl|memcpy|memset|copy|chunk_cat|split_with_sizes|all_gather|reduce_scatter|gloo",
}
"""Kernels of each part of a step by their names; the first that matches counts. All others are "the rest"."""


@dataclass(frozen=True)
class StepProfile:
    """Kernels of one step; operators where there is no GPU."""

    count: int
    ms_of_part: dict[str, float]
    table: str
    """The kernels that take longest."""


def profile(step: Callable[[], Any]) -> StepProfile:
    """Run a step under torch's profiler."""
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU where there is one
        step()
    averages, on_gpu = profiler.key_averages(), torch.cuda.is_available()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = [row for row in averages if row.device_type == kind and not row.is_user_annotation]
    times = [(row.key, row.self_device_time_total if on_gpu else row.self_cpu_time_total) for row in rows]
    sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=sort_by, row_limit=60, max_name_column_width=90)
    return StepProfile(sum(row.count for row in rows), by_part(times), table)


def by_part(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name of a kernel, microseconds) -> milliseconds of each part, the longest first."""
    total: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in times:
        total[part_of(name)] += microseconds / 1000
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def part_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel, re.IGNORECASE)), "the rest")
