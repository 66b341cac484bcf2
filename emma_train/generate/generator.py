"""Requests in, text or pictures out. Packed samples never see each other, so a batch of requests is simply one pack."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from emma_train.model.autoencoder import Autoencoder
from emma_train.objectives.draws import uniform
from emma_train.objectives.flow import draw_noise, shift
from emma_train.sequence.layout import Role, Text
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.request import Request, as_sample
from emma_train.sequence.tokens import TextTokenizer


@dataclass(frozen=True)
class FlowSettings:
    """How pictures are drawn."""

    steps: int = 30
    """Euler steps from noise to picture."""
    text_guidance: float = 2.5
    """Strength of the prompt; 1 turns guidance off."""
    image_guidance: float = 2.0
    """Strength of the reference picture in editing; 1 turns it off."""
    shift: float = 1.0
    """Flow-time shift, as in training."""


@dataclass(frozen=True)
class TextSettings:
    """How text is written."""

    max_tokens: int = 64
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    fixed_length: bool = False
    """Never stop early: every rank of a sharded model then runs as many forwards as the others."""


class Generator:
    """A model ready to be asked. Under a sharded model every rank must call it with the same requests."""

    def __init__(
        self, model: nn.Module, autoencoder: Autoencoder, tokenizer: TextTokenizer, patch: int, shuffle: int
    ) -> None:
        self.model, self.autoencoder, self.tokenizer = model, autoencoder, tokenizer
        self.patch, self.shuffle = patch, shuffle

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], settings: TextSettings = TextSettings()) -> list[str]:
        """Answers to i2t requests."""
        samples = [self._sample(r, latents) for r, latents in zip(requests, self.latents_of(requests), strict=True)]
        written: list[list[int]] = [[] for _ in samples]
        finished = [False] * len(samples)
        for place in range(settings.max_tokens):
            logits = self._last_logits(samples)
            for i, token in enumerate(_pick(logits, [r.seed for r in requests], place, settings.temperature)):
                finished[i] = finished[i] or token in (self.tokenizer.im_end, self.tokenizer.endoftext)
                if not finished[i]:
                    written[i].append(token)
                samples[i].segments.append(Text((token,)))
            if all(finished) and not settings.fixed_length:
                break
        return [self.tokenizer.decode(ids) for ids in written]

    @torch.no_grad()
    def draw_latents(self, requests: Sequence[Request], settings: FlowSettings = FlowSettings()) -> list[Tensor]:
        """Unscaled latents [rows*columns, C] of t2i or it2i requests."""
        encoded = self.latents_of(requests)
        variants = self._variants(requests, encoded, settings)
        batch = pack([sample for _, samples in variants for sample in samples]).to(self.autoencoder.device)
        assert batch.latents is not None
        latents = batch.latents * self.autoencoder.scale
        num_target = batch.counts[3]
        clean = latents[: len(latents) - num_target]
        share = num_target // len(variants)
        weights = [weight for weight, _ in variants]
        x = draw_noise(batch, latents.shape[1])[:share]
        times = shift(torch.linspace(1, 0, settings.steps + 1), settings.shift).tolist()
        for now, then in zip(times, times[1:], strict=False):
            time = torch.full((num_target,), now, device=x.device)
            velocity = self.model(batch, torch.cat([clean, *[x] * len(variants)]), time).velocity.float()
            guided = sum(w * v for w, v in zip(weights, velocity.split(share), strict=True))
            x = x + (then - now) * guided
        sizes = [rows * columns for rows, columns in batch.grids[Role.TARGET][: len(requests)]]
        return list((x / self.autoencoder.scale).split(sizes))

    def draw(self, requests: Sequence[Request], settings: FlowSettings = FlowSettings()) -> list[np.ndarray]:
        """Pictures, uint8 [H, W, 3], of t2i or it2i requests."""
        side = self.patch * self.shuffle
        latents = self.draw_latents(requests, settings)
        return [
            self.autoencoder.decode(latent, r.size[0] // side, r.size[1] // side).numpy()
            for latent, r in zip(latents, requests, strict=True)
        ]

    def _variants(
        self, requests: Sequence[Request], encoded: list[list[np.ndarray]], settings: FlowSettings
    ) -> list[tuple[float, list[Sample]]]:
        """The conditional and less conditional copies of the requests, with their weights in the guided velocity.

        v = v(nothing) + image_guidance (v(image) - v(nothing)) + text_guidance (v(image, text) - v(image)).
        """
        text, image = settings.text_guidance, settings.image_guidance
        has_image = any(r.pictures for r in requests)

        def copies(with_text: bool, with_pictures: bool) -> list[Sample]:
            return [self._sample(r, e, with_text, with_pictures) for r, e in zip(requests, encoded, strict=True)]

        variants = [(text, copies(True, True))]
        if has_image:
            variants += [(image - text, copies(False, True)), (1 - image, copies(False, False))]
        else:
            variants += [(1 - text, copies(False, True))]
        return [(weight, samples) for weight, samples in variants if weight]

    def latents_of(self, requests: Sequence[Request]) -> list[list[np.ndarray]]:
        """Latents of the pictures of each request; a blank one where there are none, which tells the channels."""
        flat = self.autoencoder.encode([torch.from_numpy(p) for r in requests for p in r.pictures])
        blank = np.zeros((0, self.autoencoder.config.channels), np.float32)
        rest = iter(flat)
        return [[next(rest).cpu().numpy() for _ in r.pictures] or [blank] for r in requests]

    def _sample(
        self, request: Request, latents: list[np.ndarray], with_text: bool = True, with_pictures: bool = True
    ) -> Sample:
        return as_sample(request, self.tokenizer, self.patch, self.shuffle, latents, with_text, with_pictures)

    def _last_logits(self, samples: Sequence[Sample]) -> Tensor:
        batch = pack(samples).to(self.autoencoder.device)
        batch.predictors = _last_text(batch, len(samples))
        scale = self.autoencoder.scale
        latents = (
            batch.latents * scale if batch.latents is not None else torch.zeros(0, self.autoencoder.config.channels)
        )
        time = torch.zeros(0, device=self.autoencoder.device)
        return self.model(batch, latents.to(self.autoencoder.device), time).logits.float()


def _last_text(batch: PackedBatch, num_samples: int) -> Tensor:
    """Stream index of the last text token of each sample: int64 [samples]."""
    owners = batch.sample[: batch.counts[0]]
    return torch.searchsorted(owners, torch.arange(num_samples, device=owners.device), right=True) - 1


def _pick(logits: Tensor, seeds: list[int], place: int, temperature: float) -> list[int]:
    """The next token of each row: the likeliest, or by Gumbel noise from its request's seed."""
    if temperature > 0:
        seed = torch.tensor(seeds, device=logits.device)[:, None]
        counters = place * logits.shape[1] + torch.arange(logits.shape[1], device=logits.device)
        logits = logits / temperature - torch.log(-torch.log(uniform(seed, counters)))
    return [int(token) for token in logits.argmax(-1).tolist()]
