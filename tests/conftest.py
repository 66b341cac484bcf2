"""One thread per test process: sums then have one order, and the machine's cores belong to pytest-xdist."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# Derandomised: a property that fails here fails for everyone, and the suite's time is the same every day.
settings.register_profile(
    "emma", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("emma")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
