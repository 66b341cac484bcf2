"""Memory that this rank uses."""

import resource

import torch


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
