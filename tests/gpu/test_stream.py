"""Packs for a GPU are in pinned memory, whether a thread or a worker reads them."""

from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("workers", [0, 2])
def test_packs_are_pinned_and_arrive_unchanged(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("webdataset")
    from data_pipelines.loader.loader import Stream
    from tests.shards import every_task, write_shards

    folder = write_shards(tmp_path, every_task(12))
    recipe = tiny_recipe(data__sources=[{"path": str(folder)}], data__workers=workers)
    plain = [p for step in Stream(recipe, 0, 1, None).steps(1, 3) for p in step.packs]
    pinned = [p for step in Stream(recipe, 0, 1, None, pin=True).steps(1, 3) for p in step.packs]
    for one, other in zip(plain, pinned, strict=True):
        assert other.patches.is_pinned() and other.text_ids.is_pinned()
        on_device = other.to(torch.device("cuda"))
        torch.cuda.synchronize()
        assert torch.equal(on_device.patches.cpu(), one.patches)
        assert torch.equal(on_device.labels.cpu(), one.labels)
