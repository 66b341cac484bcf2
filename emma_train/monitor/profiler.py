"""A trace of some steps, and the memory of the GPU over them, in the run folder's profile/."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)
PROFILE_FOLDER = "profile"
MOST_EVENTS = 1_000_000
"""Allocations and releases that a memory snapshot remembers."""


class StepProfiler:
    """Traces the steps from the first to the last of `steps`, both included. A failure to write is a warning.

    trace-….json.gz opens in Perfetto or chrome://tracing, memory-….pickle in pytorch.org/memory_viz.
    """

    def __init__(self, steps: Sequence[int], run_folder: Path, device: torch.device) -> None:
        """`steps`: [first, last], or empty for no trace."""
        self._first, self._last = (steps[0], steps[1]) if steps else (0, -1)
        self._folder, self._on_gpu = run_folder / PROFILE_FOLDER, device.type == "cuda"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begin where `step` is to be traced; a resumed run may begin in the middle."""
        if self._profile is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
            self._begun = step

    def after(self, step: int) -> None:
        """End after the last step that is to be traced, and write."""
        if self._profile is not None and step >= self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """End a trace, also where the run stops before its last step."""
        if self._profile is None:
            return
        traced, self._profile = self._profile, None
        name = f"{self._begun}-{step}"
        try:
            traced.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"trace-{name}.json.gz"
            traced.export_chrome_trace(str(trace))
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            log.warning("%s: the trace cannot be written (%s)", self._folder, error)
        else:
            log.info("steps %s traced: %s", name, trace)
