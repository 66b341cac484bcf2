"""Digests of steps: the same on any number of ranks, another one for any other sample, token or noise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emma_train.config.schema import FlowConfig
from emma_train.objectives.flow import NoisedBatch, add_noise
from emma_train.sequence.pack import PackedBatch, pack
from emma_train.sequence.step_batches import StepBatches
from emma_train.training.run_folder import RunFolder
from emma_train.training.step_digests import NOISE, PACKS, StepDigests
from tests.helpers import mixed_samples, scaled_latents, t2i_sample, tiny_recipe


class Ranks:
    """Plays the ranks of a world one after the other: sums are those of all that were asked for so far."""

    def __init__(self, sp_size: int = 1) -> None:
        self.sp_size, self.is_main = sp_size, True
        self.sums: list[float] = []

    def sum(self, values: list[float]) -> list[float]:
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values, strict=True)]
        return self.sums


def step_batches(packs: list[PackedBatch], step: int = 1) -> StepBatches:
    return StepBatches(step, packs, "planned", 1.0, [], 0.0)


def noised(batch: PackedBatch) -> NoisedBatch:
    return add_noise(batch, scaled_latents(batch), FlowConfig())


def digests(tmp_path: Path, ranks: list[list[PackedBatch]], sp_size: int = 1) -> dict[str, str]:
    """Of a step whose packs the ranks have."""
    world: Any = Ranks(sp_size)
    result: dict[str, str] = {}
    for packs in ranks:
        recorder = StepDigests(RunFolder(tiny_recipe(run__root=str(tmp_path))), world)
        recorder.add(step_batches(packs), [noised(batch).checksum for batch in packs])
        result = recorder.write()
    return result


def test_digests_do_not_depend_on_who_has_which_pack(tmp_path: Path) -> None:
    (tmp_path / "test-stage1").mkdir()
    a, b, c = (pack(mixed_samples(seed)) for seed in (1, 2, 3))
    one = digests(tmp_path, [[a, b, c]])
    assert digests(tmp_path, [[b], [c, a]]) == digests(tmp_path, [[c], [a], [b]]) == one
    assert digests(tmp_path, [[a, b, c]] * 2, sp_size=2) == one  # two ranks that share their packs
    assert len(set(one.values())) == 2
    assert all(len(value) == 16 for value in one.values())


def test_another_sample_changes_both_and_other_noise_one(tmp_path: Path) -> None:
    (tmp_path / "test-stage1").mkdir()
    a, b = pack([t2i_sample("a", seed=1)]), pack([t2i_sample("b", seed=2)])
    one = digests(tmp_path, [[a, b]])
    other_key = digests(tmp_path, [[a, replace(b, keys=["c"])]])
    other_token = digests(tmp_path, [[a, replace(b, text_ids=b.text_ids + (b.text_ids == b.text_ids[3]))]])
    for other in (other_key, other_token):
        assert one[PACKS] != other[PACKS]
    swapped = digests(tmp_path, [[replace(a, noise_seeds=b.noise_seeds), replace(b, noise_seeds=a.noise_seeds)]])
    other_time = digests(tmp_path, [[a, replace(b, time_seeds=b.time_seeds + 1)]])
    for other in (swapped, other_time):
        assert one[PACKS] == other[PACKS]
        assert one[NOISE] != other[NOISE]


def test_the_checksum_sees_one_bit_and_the_order() -> None:
    step = noised(pack(mixed_samples()))
    assert step.checksum == noised(pack(mixed_samples())).checksum
    for row, column in ((0, 0), (5, 31), (len(step.noise) - 1, 7)):
        bits = step.noise.clone()
        bits.view(torch.int32)[row, column] ^= 1
        assert replace(step, noise=bits).checksum != step.checksum
    assert replace(step, noise=step.noise.flip(0)).checksum != step.checksum
    assert replace(step, time=step.time + 1e-7).checksum != step.checksum


def test_every_step_is_written_and_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    run, world = RunFolder(tiny_recipe(run__root=str(tmp_path))), Ranks()
    run.path.mkdir()
    run.digests.write_text('\n{"step": 1, "data/di')
    recorder = StepDigests(run, world)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        recorder.add(step_batches([pack([t2i_sample()])], step), [])
    recorder.write()
    assert recorder.write() == {}
    lines = run.digests.read_text().splitlines()[2:]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
