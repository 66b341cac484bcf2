"""EMMA: one pack of samples in, text logits and velocities out (paper §2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emma_train.config.schema import ModelConfig
from emma_train.model.adapters import Adapter, GenAdapter, position_2d
from emma_train.model.attention import build_plan, select_backend
from emma_train.model.cache import KVCache
from emma_train.model.decoder import Decoder
from emma_train.model.vision import VERSATILE, VisionEncoder
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import PackedBatch


class Prediction(NamedTuple):
    """The outputs for a pack. A tuple, because FSDP before torch 2.13 looks for tensors in tuples only."""

    logits: Tensor | None
    """[L, vocab] at the pack's predictors; None where their losses were asked for."""
    velocity: Tensor
    """[target tokens, channels]."""
    router_logits: Tensor | None
    """[understanding and reference images, 2]; None where there is no router."""
    text_losses: Tensor | None = None
    """float32 [L]: cross-entropy of the pack's labels; None where logits were asked for."""


class Emma(nn.Module):
    """The trainable network. The autoencoder, which never trains, stays outside (model/autoencoder.py)."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        """`backend` is the recipe's attention.backend."""
        super().__init__()
        self.backend = backend
        semantic = config.vision.shuffle**2 * config.vision.hidden
        latent, hidden = config.autoencoder.channels, config.decoder.hidden
        self.config = config
        self.vision = VisionEncoder(config.vision, backend)
        self.und_adapter = Adapter(semantic, latent, hidden)
        self.gen_adapter = GenAdapter(
            semantic,
            latent,
            hidden,
            config.time_features,
            has_mlp=config.adapters == "two",
            has_placeholder=config.placeholder == "learned",
        )
        self.decoder = Decoder(config.decoder)
        self.velocity_head = nn.Linear(hidden, latent)

    def forward(
        self,
        batch: PackedBatch,
        latents: Tensor,
        time: Tensor,
        experts: Sequence[int] | None = None,
        losses: bool = False,
        cache: KVCache | None = None,
    ) -> Prediction:
        """latents: [cells of all images, C], scaled, in stream order, target rows noised; time: [target tokens], from 0
        to 1.

        Text comes out as logits, or, where `losses` are asked for, as its losses, which take far less memory.
        With a cache, a pack may continue the packs before it (sequence/pack.py, `continued`): its tokens see theirs.

        Every module runs for every pack, on no rows where it has nothing to do, so that all ranks run the same
        modules in the same order (contract 3).
        """
        num_text, num_und, _, num_target = batch.counts
        cells_und, cells_reference, _ = batch.num_cells
        und_grids, reference_grids = batch.grids[ImageRole.UND], batch.grids[ImageRole.REFERENCE]
        shown = [*und_grids, *reference_grids]
        seen, num_routed = (shown, len(und_grids)) if self.config.fusion != "latent" else ([], 0)
        vision = self.vision(self.pixels(batch), seen, experts, num_routed=num_routed)
        semantic = vision.features
        text = self.decoder.embed_tokens(batch.text_ids)
        of_und, of_reference, of_target = latents.split([cells_und, cells_reference, num_target])
        if self.config.fusion == "semantic":
            latents = torch.cat([torch.zeros_like(of_und), torch.zeros_like(of_reference), of_target])
        elif self.config.fusion == "token":
            given = (torch.zeros_like(of_und), of_und, torch.zeros_like(of_reference), of_reference)
            latents = torch.cat([*given, of_target])
        und_latents = latents[:num_und]
        if batch.semantic_only is not None:
            und_latents = und_latents.masked_fill(batch.semantic_only[:, None], 0.0)
        und = self.und_adapter(semantic[:cells_und], und_latents)
        shared = self.und_adapter if self.config.adapters == "one" else None
        gen = self.gen_adapter.forward_images(semantic[cells_und:], latents[num_und:], time, shared)
        times = 2 if self.config.fusion == "token" else 1
        grids = [*und_grids * times, *reference_grids * times, *batch.grids[ImageRole.TARGET]]
        visual = torch.cat([und, gen])
        positions = position_2d(grids, visual.shape[-1], visual.device)
        visual = visual + (self.config.position_scale * positions).to(visual.dtype)
        stream = torch.cat([text.to(visual.dtype), visual])
        plan = build_plan(batch, cache, select_backend(self.backend, stream.device, stream.dtype))
        position = batch.position if batch.rotary_position is None else batch.rotary_position
        hidden = self.decoder(stream, num_text + num_und, position, plan, cache)
        predictors = hidden[batch.predictors]
        return Prediction(
            logits=None if losses else self.decoder.logits(predictors),
            velocity=self.velocity_head(hidden[len(hidden) - num_target :]),
            router_logits=vision.router_logits,
            text_losses=self.decoder.losses(predictors, batch.labels) if losses else None,
        )

    def route(self, batch: PackedBatch) -> Tensor:
        """Router logits [understanding and reference images, 2], without running experts or decoder (Stage 4,
        router)."""
        seen = [*batch.grids[ImageRole.UND], *batch.grids[ImageRole.REFERENCE]]
        logits = self.vision(self.pixels(batch), seen, route_only=True).router_logits
        assert logits is not None
        return logits

    def pixels(self, batch: PackedBatch) -> Tensor:
        """Patches of the images to be seen, in [-1, 1]."""
        num_given = 0 if self.config.fusion == "latent" else sum(batch.num_cells[:2])
        num_seen = num_given * self.config.vision.shuffle**2
        side = self.config.vision.patch
        patches = batch.patches[:num_seen].reshape(num_seen, side * side * 3)
        # In float32, as SigLIP2 saw them: bf16 would be off by up to half a grey level.
        return (patches.float() / 127.5 - 1.0).to(self.vision.patch_embedding.weight.dtype)


def training_experts(batch: PackedBatch) -> list[int]:
    """Stage 4, expert: images labelled STEM take the STEM expert, all others the versatile one."""
    num_reference = len(batch.grids[ImageRole.REFERENCE])
    return [max(VERSATILE, int(s)) for s in batch.stem_labels] + [VERSATILE] * num_reference
