"""From a planned sample to its bytes, verified, and on to the sample. Stateless, so any process may read any sample."""

import numpy as np

from data_pipelines.loader.sample_builder import SampleBuilder, SampleError
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.shards.latents import cached_latent, latents_of, transform_name
from data_pipelines.shards.tar import crc32, read_group
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.errors import RunError, UserError
from emma_train.sequence.pack import Sample
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.object_store import Storage, StorageError, shown


class Reader:
    """Reads planned samples."""

    def __init__(
        self, data: DataConfig, tokenizer: TextTokenizer, patch: int, shuffle: int, latents: str | None
    ) -> None:
        """`latents` is the fingerprint of the autoencoder whose cached latents may be used; None uses none."""
        self.sampler, self.latents = SampleBuilder(data, tokenizer, patch, shuffle), latents
        self.storage = Storage.of(data)

    def read(self, planned: SampleRef, latents: bool = True) -> Sample:
        """The sample as the plan wants it; `latents` False leaves cached ones alone. Raises BadSample."""
        try:
            members = self.members(planned)
            return self.sampler.sample(
                planned, members, lambda name, image: self._latent(planned, name, image) if latents else None
            )
        except (SampleError, UserError, RunError):
            raise
        except Exception as error:  # whatever a stranger's data raises, the run goes on without this sample
            raise SampleError(f"{type(error).__name__}: {error}") from error

    def members(self, planned: SampleRef) -> dict[str, memoryview]:
        """The record's parts by name, as the index saw them. Raises BadSample.

        Bytes that differ from the index are read again: if the way here was at fault they come right, and if the shard
        is, they do not.
        """
        for _ in range(2):
            try:
                data = self.storage.read(planned.url, planned.offset, planned.size, planned.shard)
            except StorageError as error:
                raise SampleError(str(error), unreachable=error.passing) from None
            if crc32(data) == planned.crc32:
                return read_group(data)
            self.storage.forget(planned.url, planned.shard)
        raise SampleError(f"{shown(planned.url)}: bytes differ from the index's crc32")

    def _latent(self, planned: SampleRef, name: str, image: ImageConfig) -> np.ndarray | None:
        if self.latents is None:
            return None
        url = latents_of(planned.url, transform_name(image))
        return cached_latent(url, f"{planned.key}/{name}", self.latents, planned.shard, self.storage)
