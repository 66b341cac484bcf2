"""Reads and verifies the bytes of a planned sample and builds the sample. Stateless: any process reads any sample."""

import numpy as np

from data_pipelines.loader.sample_builder import SampleBuilder, SampleError
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.shards.images import image_members
from data_pipelines.shards.latents import cached_latent, latents_path, transform_name
from data_pipelines.shards.record_map import RecordMap, read_map
from data_pipelines.shards.tar import crc32, read_group
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.errors import RunError, UserError, describe_shortage
from emma_train.sequence.image_rules import EMMA_RULES, ImageRules
from emma_train.sequence.pack import Sample
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, parent_url


class SampleReader:
    """Reads planned samples."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TextTokenizer,
        patch: int,
        shuffle: int,
        autoencoder_fingerprint: str | None,
        rules: ImageRules = EMMA_RULES,
    ) -> None:
        """Cached latents are used if they are of the autoencoder with this fingerprint; None uses none."""
        self.builder = SampleBuilder(data, tokenizer, patch, shuffle, rules)
        self.autoencoder_fingerprint = autoencoder_fingerprint
        self.storage = ShardReader.from_config(data)
        self._maps: dict[str, RecordMap | None] = {}

    def read(self, planned: SampleRef, use_cached: bool = True) -> Sample:
        """The planned sample; `use_cached` False leaves cached latents alone. Raises SampleError, and RunError or
        UserError if the local cache fails."""
        try:
            members = self.members(planned)
            files = image_members(members)
            return self.builder.sample(
                planned,
                members,
                lambda name, c: self._latent(planned, name, files[name], c) if use_cached else None,
                self._map(planned),
            )
        except (SampleError, UserError, RunError):
            raise
        except Exception as error:  # foreign data can raise anything; the run continues without this sample
            if (shortage := describe_shortage(error)) is not None:
                raise RunError(shortage) from None
            raise SampleError(f"{type(error).__name__}: {error}") from error

    def members(self, planned: SampleRef) -> dict[str, memoryview]:
        """The record's members by name. Raises SampleError if the bytes differ from the index.

        Wrong bytes are read a second time, because the error can be in the transfer and not in the shard.
        """
        for _ in range(2):
            try:
                data = self.storage.read_range(planned.url, planned.offset, planned.size, planned.shard)
            except StorageError as error:
                raise SampleError(str(error), unreachable=not error.permanent) from None
            if crc32(data) == planned.crc32:
                return read_group(data)
            self.storage.forget(planned.url, planned.shard)
        raise SampleError(f"{display_url(planned.url)}: bytes differ from the index's crc32")

    def _map(self, planned: SampleRef) -> RecordMap | None:
        """The map of the shard's folder, read once."""
        folder = parent_url(planned.url)
        if folder not in self._maps:
            self._maps[folder] = read_map(folder, self.storage)
        return self._maps[folder]

    def _latent(self, planned: SampleRef, name: str, image: memoryview, image_config: ImageConfig) -> np.ndarray | None:
        if self.autoencoder_fingerprint is None:
            return None
        url = latents_path(planned.url, transform_name(image_config))
        fingerprint = self.autoencoder_fingerprint
        return cached_latent(url, f"{planned.key}/{name}", image, fingerprint, planned.shard, self.storage)
