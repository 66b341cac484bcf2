"""Memory that this rank uses."""

import resource
from pathlib import Path

import torch


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB since the last call: the allocator's on a GPU, the process's on a CPU. Where the
    system cannot reset the process's peak, it is that since the start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(line.split()[1]) / 2**20
