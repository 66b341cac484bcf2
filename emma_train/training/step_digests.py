"""Digests of every step: what the ranks had in their packs, and the noise that they drew (docs/reliability.md).

`emma-train audit` compares them between runs and between the times that a step was computed. A digest is a sum over
packs, and the packs of a step are the same on any number of ranks (contract 2), so the ranks do not matter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emma_train.engine.world import World
from emma_train.sequence.pack import PackedBatch
from emma_train.sequence.step_batches import StepBatches
from emma_train.training.run_folder import RunFolder

DATA, PACKS, NOISE = "data/digest", "packs/digest", "noise/digest"
SKIPPED = "skipped"
"""In the place of a digest: the step was not trained."""
_BITS_32, _BITS_64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class _PendingStep:
    step: int
    data: str
    skipped: bool
    packs: list[bytes]
    """Hash of each pack of this rank."""
    noise: Tensor
    """int64 [packs] on the device: checksum of the noise of each pack."""


class StepDigests:
    """Collects the digests of each step and writes digests.jsonl. Never waits for the device but in `write`."""

    def __init__(self, run: RunFolder, world: World) -> None:
        self._run = run
        self._world = world
        self._pending: list[_PendingStep] = []

    def add(self, data: StepBatches, noise_checksums: Sequence[Tensor]) -> None:
        """Note a step of this rank; `noise_checksums` has one for each pack, or none where the stage draws no noise."""
        noise = torch.stack(list(noise_checksums)) if noise_checksums else torch.zeros(len(data.packs)).long()
        hashes = [pack_hash(batch) for batch in data.packs]
        self._pending.append(_PendingStep(data.step, data.digest, data.skipped, hashes, noise))

    def write(self) -> dict[str, str]:
        """Append the steps since the last call to digests.jsonl; every rank calls it. Returns the digests of the last
        one by metric name, without the planner's; nothing where there was no step."""
        numbers: list[float] = []
        for step in self._pending:
            for total in _sums(step.packs, step.noise.tolist()):
                numbers += [total >> 32, total & _BITS_32]
        sums = self._world.sum(numbers) if numbers else []
        records: list[dict[str, int | str]] = []
        for index, step in enumerate(self._pending):
            high_packs, low_packs, high_noise, low_noise = sums[4 * index : 4 * index + 4]
            digests = {PACKS: self._text(high_packs, low_packs), NOISE: self._text(high_noise, low_noise)}
            if step.skipped:
                digests = dict.fromkeys(digests, SKIPPED)
            records.append({"step": step.step, DATA: step.data, **digests})
        self._pending = []
        if self._world.is_main:
            self._run.append_digests(records)
        return {name: str(records[-1][name]) for name in (PACKS, NOISE)} if records else {}

    def _text(self, high: float, low: float) -> str:
        """16 hexadecimal digits of a sum over ranks of 64-bit numbers, which came in two exact halves."""
        total = (int(high) << 32) + int(low)
        # Ranks that share a pack all counted it.
        return f"{total // self._world.sp_size & _BITS_64:016x}"


def pack_hash(batch: PackedBatch) -> bytes:
    """Hash of what a pack holds: keys, tasks, tokens, sizes of images and what is hidden of them; not their pixels."""
    grids = [(int(role), grids) for role, grids in sorted(batch.grids.items())]
    lines = [*batch.keys, *batch.tasks, str(grids), str(batch.stem_labels)]
    digest = hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8)
    for tensor in (batch.text_ids, batch.labels, batch.semantic_only):
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return digest.digest()


def _sums(packs: Sequence[bytes], noise: Sequence[int]) -> tuple[int, int]:
    """Of this rank: the sum of its packs' hashes, and of hashes of (pack, its noise); 64 bits."""
    # Without the pack in it, the noise of two packs could be swapped and the sum would be the same.
    of_noise = [
        hashlib.blake2b(pack + checksum.to_bytes(8, "little", signed=True), digest_size=8).digest()
        for pack, checksum in zip(packs, noise, strict=True)
    ]
    sum_packs, sum_noise = (sum(int.from_bytes(value, "little") for value in hashes) for hashes in (packs, of_noise))
    return sum_packs & _BITS_64, sum_noise & _BITS_64
