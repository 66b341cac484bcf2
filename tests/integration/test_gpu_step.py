"""The benchmark of optimizer steps runs on a CPU too, so that it works when a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from emma_train.model.attention import hybrid_mask
from emma_train.plan.arithmetic import Plan
from emma_train.sequence.pack import pack
from tests.gpu.from_shards import measure_from_shards
from tests.gpu.kernel_time import by_part
from tests.gpu.padded import IGNORED, measure_padded, padded
from tests.gpu.stage_packs import SHAPES, make_sample
from tests.gpu.step_setting import Scale, Setting, load_of, make_recipe, make_samples
from tests.helpers import ROOT

TINY = Scale("cpu", tiny=True, num_layers=2, micro_steps=1, num_steps=2)
PADDED = Setting("padded", compile=False, padded=True, times=1 / 8)


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
    rng = np.random.default_rng(0)
    samples = [make_sample(recipe, str(n), task, 4, 4, rng) for n in range(3) for task in ("i2t", "t2i")]
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


@pytest.mark.parametrize("stage", SHAPES)
def test_packs_have_the_tasks_of_their_recipe(stage: str) -> None:
    """In its proportions, with as many samples a pack as the recipe has; the plan's load counts all their tokens."""
    setting = Setting(stage, stage=stage)
    recipe = make_recipe(setting, TINY)
    (samples,) = make_samples(recipe, setting, TINY)
    plan = Plan(recipe, "", 1, "h100-80g")
    assert len(samples) == recipe.data.samples_per_step // recipe.data.slots
    load = load_of(plan.loads[-1], samples)
    shares = {task: count // recipe.data.slots for task, count in plan.loads[-1].samples.items()}
    assert load.samples == shares
    assert load.tokens == pytest.approx(pack(samples).num_tokens)


def test_kernels_are_counted_by_what_they_do() -> None:
    """Names as torch's profiler gives them on an H100."""
    times = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": 4.0,
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": 1.0,
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": 2.0,
        "triton_poi_fused__to_copy_mul_silu_3": 0.5,
        "triton_tem_fused_flex_attention_0": 0.25,
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor<float, 4>>": 0.75,
        "Memcpy HtoD (Pinned -> Device)": 0.125,
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": 0.125,
        "void at::native::index_elementwise_kernel<128, 4, ...>": 0.0625,
    }
    assert by_part([(name, 1000 * ms) for name, ms in times.items()]) == {
        "products": 5.0,
        "attention": 2.25,
        "optimizer": 0.75,
        "compiled elementwise": 0.5,
        "copies and exchange": 0.25,
        "the rest": 0.0625,
    }


@pytest.mark.slow
def test_training_from_shards_is_measured(tmp_path: Path) -> None:
    values = measure_from_shards(Setting("from-shards", compile=False, from_shards=True), TINY, tmp_path)
    assert 0 <= values["data_wait"] < 1 and values["step_s"] > 0
    assert not values["autoencoder_loaded"], "latents of all images are cached"
    assert values["samples_per_s"] * values["step_s"] == pytest.approx(16, rel=0.5)
