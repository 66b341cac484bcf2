"""The benchmark of optimizer steps runs on a CPU too, so that it works when a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from emma_train.model.attention import hybrid_mask
from emma_train.sequence.pack import pack
from tests.gpu.padded import IGNORED, measure_padded, padded
from tests.gpu.step_setting import Scale, Setting, make_recipe, make_samples
from tests.helpers import ROOT

TINY = Scale("cpu", tiny=True, num_layers=2, micro_steps=1, num_steps=2)
PADDED = Setting("padded", compile=False, padded=True, pairs=1)


def test_the_step_benchmark_measures_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "tests/gpu/step.py", "--device", "cpu", "--tiny", "--only", "eager", "compile-flex"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    eager, flex = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert eager["step_s"] > 0 and eager["tokens_per_s"] > 0 and eager["flops"] > 0
    assert eager["last_loss"] < eager["first_loss"]
    assert "Self CPU" in (tmp_path / "profile-eager.txt").read_text()
    # A setting that cannot run here is an entry with its error and stops no other.
    assert "needs an NVIDIA GPU" in flex["error"] and "error-compile-flex.txt" in {p.name for p in tmp_path.iterdir()}
    assert "| eager | 4 |" in (tmp_path / "step").with_suffix(".md").read_text()


def test_the_padded_baseline_computes_what_packs_do() -> None:
    """Each sample sees the same tokens and predicts as many, however long the batch is."""
    recipe = make_recipe(PADDED, TINY)
    samples = [s for n in range(3) for s in make_samples(recipe, str(n), 4, 4, np.random.default_rng(n))]
    batch = padded(recipe, samples, 4)
    for row, sample in enumerate(samples):
        alone = pack([sample])
        order = alone.position.argsort()
        mask = batch.mask[row, 0, : sample.num_tokens, : sample.num_tokens]
        assert torch.equal(mask, hybrid_mask(alone)[order][:, order])
        assert not batch.mask[row, 0, : sample.num_tokens, sample.num_tokens :].any()
        assert int((batch.labels[row] != IGNORED).sum()) == len(alone.labels)
    assert len(batch.made) == len(batch.latents) == pack(samples).counts[3]


@pytest.mark.seconds
def test_the_padded_baseline_learns_and_reports(tmp_path: Path) -> None:
    values = measure_padded(PADDED, TINY, tmp_path)
    assert values["samples_per_s"] * values["step_s"] == pytest.approx(2)
    assert values["padded_tokens_per_micro_step"] >= values["tokens_per_micro_step"]
    assert 0 < values["last_loss"] < values["first_loss"]
