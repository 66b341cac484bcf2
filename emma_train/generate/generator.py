"""Requests in, text or images out. Packed samples never see each other, so a batch of requests is simply one pack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.cache import KVCache
from emma_train.objectives.counter_rng import uniform
from emma_train.objectives.flow import draw_noise, shift
from emma_train.objectives.next_token import next_token_loss
from emma_train.sequence.image_rules import EMMA_RULES, ImageRules
from emma_train.sequence.layout import ImageRole, Segment, TextSegment, num_text_tokens
from emma_train.sequence.pack import PackedBatch, Sample, continued, pack
from emma_train.sequence.request import Request, as_sample
from emma_train.sequence.tokens import TextTokenizer

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class AnswerLikelihood:
    """Natural logarithms of the probabilities that a model gives an answer."""

    tokens: tuple[float, ...]
    """Of each token of the answer and, last, of its end."""
    is_greedy: bool
    """Whether every token of the answer is the likeliest one."""

    @property
    def text(self) -> float:
        """Of the answer, whatever follows it."""
        return sum(self.tokens[:-1])


class Generator:
    """Answers requests with a model. If the model is sharded, every rank must call it with the same requests."""

    def __init__(
        self,
        model: nn.Module,
        autoencoder: Autoencoder,
        tokenizer: TextTokenizer,
        patch: int,
        shuffle: int,
        cached: bool = True,
        rules: ImageRules = EMMA_RULES,
    ) -> None:
        """`cached`: compute the tokens before a new token or a target once; if false, at every step (the reference).
        `rules` are those that the model is trained with."""
        self.model, self.autoencoder, self.tokenizer = model, autoencoder, tokenizer
        self.patch, self.shuffle, self.cached, self.rules = patch, shuffle, cached, rules

    @torch.no_grad()
    def generate_text(self, requests: Sequence[Request], settings: TextSettings = TextSettings()) -> list[str]:
        """Answers to requests of a task that makes text."""
        samples = [self.sample_of(r, latents) for r, latents in zip(requests, self.latents_of(requests), strict=True)]
        written: list[list[int]] = [[] for _ in samples]
        finished = [False] * len(samples)
        longest = max(sample.num_tokens for sample in samples)
        cache = KVCache(len(samples), longest + settings.max_tokens) if self.cached else None
        for position in range(settings.max_tokens):
            parts = samples if position == 0 or cache is None else [_segments(sample, -1) for sample in samples]
            logits = self._last_logits(_end_of(samples, parts), cache)
            for i, token in enumerate(
                sample_next_token(logits, [r.seed for r in requests], position, settings.temperature)
            ):
                finished[i] = finished[i] or token in (self.tokenizer.im_end, self.tokenizer.endoftext)
                if not finished[i]:
                    written[i].append(token)
                    finished[i] = self._has_stop(written[i], settings.stop)
                samples[i].segments.append(TextSegment((token,)))
            if all(finished) and not settings.fixed_length:
                break
        return [_before_stop(self.tokenizer.decode(ids), settings.stop) for ids in written]

    @torch.no_grad()
    def answer_likelihoods(self, requests: Sequence[Request], answers: Sequence[str]) -> list[AnswerLikelihood]:
        """How likely an answer to each request is: what training on request and answer has as its text loss."""
        samples = [
            self.sample_of(r, latents, answer=answer)
            for r, answer, latents in zip(requests, answers, self.latents_of(requests), strict=True)
        ]
        samples = [replace(sample, segments=_only_last_supervised(sample.segments)) for sample in samples]
        batch = pack(samples).to(self.autoencoder.device)
        logits = self._logits(batch, None)
        lengths = [num_text_tokens(sample.segments)[1] for sample in samples]
        losses = next_token_loss(logits, batch.labels).split(lengths)
        likeliest = (logits.argmax(-1) == batch.labels).split(lengths)
        return [
            AnswerLikelihood(tuple((-loss).tolist()), bool(is_likeliest[:-1].all()))
            for loss, is_likeliest in zip(losses, likeliest, strict=True)
        ]

    @torch.no_grad()
    def generate_latents(self, requests: Sequence[Request], settings: FlowSettings = FlowSettings()) -> list[Tensor]:
        """Unscaled latents [rows*columns, C] of requests of a task that makes images."""
        encoded = self.latents_of(requests)
        guided, noise, sizes = self._make_velocity(self._variants(requests, encoded, settings), settings)
        plain, x = guided, noise[: sum(sizes)]
        if settings.guidance_from > 0 or settings.guidance_to < 1:
            unguided = replace(settings, text_guidance=1.0, image_guidance=1.0, guidance_renorm=False)
            plain, _, _ = self._make_velocity(self._variants(requests, encoded, unguided), unguided)

        def velocity(x: Tensor, time: float) -> Tensor:
            return guided(x, time) if settings.guides(time) else plain(x, time)

        for now, then in pairwise(shift(torch.linspace(1, 0, settings.steps + 1), settings.shift).tolist()):
            slope = velocity(x, now)
            # Time 0 itself is never trained, so Heun ends with a step of Euler.
            if settings.solver == "heun" and then > 0:
                slope = (slope + velocity(x + (then - now) * slope, then)) / 2
            x = x + (then - now) * slope
        return list((x / self.autoencoder.scale).split(sizes))

    def _make_velocity(
        self, variants: list[tuple[float, list[Sample]]], settings: FlowSettings
    ) -> tuple[Velocity, Tensor, list[int]]:
        """The weighted velocity of copies of the requests as a function of (x, flow time), the noise to start from, and
        the tokens of each request's image."""
        parts = samples = [sample for _, copies in variants for sample in copies]
        cache = None
        if self.cached:
            cache = KVCache(len(samples), max(sample.num_tokens for sample in samples))
            self._last_logits(pack([_segments(sample, 0, -1) for sample in samples]), cache)
            parts = [_segments(sample, -1) for sample in samples]
        batch = _end_of(samples, parts).to(self.autoencoder.device)
        assert batch.latents is not None
        latents = batch.latents * self.autoencoder.scale
        num_target = batch.counts[3]
        clean = latents[: len(latents) - num_target]
        share = num_target // len(variants)
        weights = [weight for weight, _ in variants]
        grids = batch.grids[ImageRole.TARGET][: len(batch.grids[ImageRole.TARGET]) // len(variants)]
        sizes = [rows * columns for rows, columns in grids]

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full((num_target,), time, device=x.device)
            each = self.model(batch, torch.cat([clean, *[x] * len(variants)]), times, cache=cache).velocity.float()
            copies = each.split(share)
            total = torch.stack([w * v for w, v in zip(weights, copies, strict=True)]).sum(0)
            return keep_norm(total, copies[0], sizes) if settings.guidance_renorm else total

        return velocity, draw_noise(batch, latents.shape[1]), sizes

    def generate_images(self, requests: Sequence[Request], settings: FlowSettings = FlowSettings()) -> list[np.ndarray]:
        """Images, uint8 [H, W, 3], of requests of a task that makes images."""
        side = self.patch * self.shuffle
        latents = self.generate_latents(requests, settings)
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
        has_image = any(r.images for r in requests)

        def copies(with_text: bool, with_images: bool) -> list[Sample]:
            return [self.sample_of(r, e, with_text, with_images) for r, e in zip(requests, encoded, strict=True)]

        variants = [(text, copies(True, True))]
        if has_image:
            variants += [(image - text, copies(False, True)), (1 - image, copies(False, False))]
        else:
            variants += [(1 - text, copies(False, True))]
        # Renormalisation needs the conditional velocity even where its weight is 0.
        first = variants[:1] if settings.guidance_renorm else []
        return [*first, *(variant for variant in variants[len(first) :] if variant[0])]

    def latents_of(self, requests: Sequence[Request]) -> list[list[np.ndarray]]:
        """Latents of the images of each request; for one without images an empty array with the right channels."""
        flat = self.autoencoder.encode([torch.from_numpy(p) for r in requests for p in r.images])
        blank = np.zeros((0, self.autoencoder.config.channels), np.float32)
        rest = iter(flat)
        return [[next(rest).cpu().numpy() for _ in r.images] or [blank] for r in requests]

    def sample_of(
        self,
        request: Request,
        latents: list[np.ndarray],
        with_text: bool = True,
        with_images: bool = True,
        answer: str | None = None,
    ) -> Sample:
        """A request as a sample of this model; arguments as in sequence/request.py, `as_sample`."""
        sample = as_sample(request, self.tokenizer, self.patch, self.shuffle, latents, with_text, with_images, answer)
        return replace(sample, rules=self.rules)

    def _has_stop(self, ids: list[int], stop: Sequence[str]) -> bool:
        """Whether one of the texts stands at the end of what is written, with what the last token adds to it."""
        # A token has at least one byte, so a text of n bytes lies within so many tokens and the last one.
        return any(text in self.tokenizer.decode(ids[-len(text.encode()) - 1 :]) for text in stop)

    def _last_logits(self, batch: PackedBatch, cache: KVCache | None) -> Tensor:
        """Logits after the last text token of each sample: float32 [samples, vocab]."""
        batch = batch.to(self.autoencoder.device)
        batch.predictors = _last_text(batch, len(batch.keys))
        return self._logits(batch, cache)

    def _logits(self, batch: PackedBatch, cache: KVCache | None) -> Tensor:
        """Logits at the predictors of a pack on the device: float32 [L, vocab]."""
        scale = self.autoencoder.scale
        latents = (
            batch.latents * scale if batch.latents is not None else torch.zeros(0, self.autoencoder.config.channels)
        )
        time = torch.zeros(0, device=self.autoencoder.device)
        return self.model(batch, latents.to(self.autoencoder.device), time, cache=cache).logits.float()


def keep_norm(guided: Tensor, conditional: Tensor, sizes: Sequence[int]) -> Tensor:
    """The guided velocity, where its norm over an image exceeds that of the conditional one scaled down to it. Both:
    [target tokens, C]; `sizes`: tokens of each image."""
    pairs = zip(guided.split(sizes), conditional.split(sizes), strict=True)
    return torch.cat([v * (c.norm() / v.norm().clamp_min(1e-12)).clamp(max=1.0) for v, c in pairs])


def _segments(sample: Sample, start: int, stop: int | None = None) -> Sample:
    """A sample of some of another's segments."""
    return replace(sample, segments=sample.segments[start:stop])


def _end_of(samples: Sequence[Sample], parts: Sequence[Sample]) -> PackedBatch:
    """A pack of the last parts of samples, at the positions that they have in the samples."""
    starts = [len(sample.segments) - len(part.segments) for sample, part in zip(samples, parts, strict=True)]
    return continued(pack(parts), [_segments(s, 0, start) for s, start in zip(samples, starts, strict=True)])


def _only_last_supervised(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, of which only the last one is supervised: the last answer and not those of earlier turns."""
    return [
        replace(s, supervised=i + 1 == len(segments)) if isinstance(s, TextSegment) else s
        for i, s in enumerate(segments)
    ]


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the texts at which it ends."""
    return text[: min([at for s in stop if (at := text.find(s)) >= 0], default=len(text))]


def _last_text(batch: PackedBatch, num_samples: int) -> Tensor:
    """Stream index of the last text token of each sample: int64 [samples]."""
    owners = batch.sample[: batch.counts[0]]
    return torch.searchsorted(owners, torch.arange(num_samples, device=owners.device), right=True) - 1


def sample_next_token(logits: Tensor, seeds: list[int], position: int, temperature: float) -> list[int]:
    """The next token of each row: the most probable one, or one sampled with Gumbel noise from the request's seed."""
    if temperature > 0:
        seed = torch.tensor(seeds, device=logits.device)[:, None]
        counters = position * logits.shape[1] + torch.arange(logits.shape[1], device=logits.device)
        logits = logits / temperature - torch.log(-torch.log(uniform(seed, counters)))
    return [int(token) for token in logits.argmax(-1).tolist()]
