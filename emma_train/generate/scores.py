"""Scores on a held-out split with known answers. Every score has its standard error, its baseline and, perhaps, the
value to reach.

- Exact match of answers, per kind of question. Baseline: always the commonest answer.
- Velocity loss of flow matching on the split's images. Baseline: the mean velocity.
- Share of generated images whose nearest real image, in latent space, has the prompted concept, style or background.
  Baseline: a real image picked at random.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emma_train.config.schema import FlowConfig
from emma_train.generate.generator import Generator
from emma_train.generate.items import EvaluationItem, cluster_stderr, make_score, share_stderr
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.objectives.flow import add_noise, velocity_loss
from emma_train.sequence.answers import final_answer
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import ImageTokens, pack
from emma_train.sequence.request import Request

BATCH = 32
BAR_SPLIT = "heldout_drawings"
GROUP_BAR = 0.60
VELOCITY_BAR = 0.60
"""Group answers: at least 60 % right. Velocity loss: at most 60 % of the baseline's."""
ANSWER_TOKENS = 12
"""Of answers without steps."""


def with_bar(score: dict[str, Any]) -> dict[str, Any]:
    """The score with the value to reach, if it has one.

    Only BAR_SPLIT, with new drawings of concepts of the training set, has values to reach: a model cannot name a
    concept whose name it was not trained on.
    """
    if score["split"] != BAR_SPLIT:
        return score
    if score["task"] == "i2t_group":
        return {**score, "bar": GROUP_BAR}
    if score["metric"] == "velocity_loss":
        return {**score, "bar": VELOCITY_BAR * score["baseline"]}
    return score


def answer_items(
    generator: Generator, split: str, requests: Sequence[Request], max_tokens: int = ANSWER_TOKENS
) -> list[EvaluationItem]:
    """Answers to questions, right where they match the truth exactly; of an answer in steps, where its last part does.
    Baseline: the commonest answer of the kind."""
    truths = {r.key: final_answer(r.truth or "") for r in requests}
    commonest = {
        kind: Counter(truths[r.key] for r in requests if r.kind == kind).most_common(1)[0][0]
        for kind in {r.kind for r in requests}
    }
    items, settings = [], TextSettings(max_tokens=max_tokens)
    for asked in _batches(sorted(requests, key=lambda r: r.kind)):
        for request, answer in zip(asked, generator.generate_text(asked, settings), strict=True):
            truth = truths[request.key]
            right = {"exact_match": final_answer(answer) == truth}
            item = EvaluationItem(split, "i2t", request.kind, request.key, request.text, request.seed, right)
            item.output, item.truth = answer.strip(), request.truth or ""
            item.baseline = {"exact_match": commonest[request.kind] == truth}
            items.append(item)
    return items


def generated_latents(generator: Generator, requests: Sequence[Request], settings: FlowSettings) -> list[Tensor]:
    """Unscaled latents of the images that a model makes for the requests."""
    return [x for asked in _batches(requests) for x in generator.generate_latents(asked, settings)]


def decoded_images(generator: Generator, requests: Sequence[Request], latents: Sequence[Tensor]) -> list[np.ndarray]:
    """The images of generated latents: uint8 [H, W, 3]."""
    side = generator.patch * generator.shuffle
    return [
        generator.autoencoder.decode(latent, r.size[0] // side, r.size[1] // side).numpy()
        for latent, r in zip(latents, requests, strict=True)
    ]


@torch.no_grad()
def velocity_score(
    generator: Generator, split: str, requests: Sequence[Request], flow: FlowConfig, task: str
) -> dict[str, Any]:
    """Mean velocity loss over the requests' targets, and that of predicting the mean velocity of each channel."""
    losses: list[Tensor] = []
    velocities = []
    for asked in _batches(requests):
        samples = []
        for request, latents in zip(asked, generator.latents_of(asked), strict=True):
            assert request.target is not None
            sample = generator.sample_of(request, latents)
            grid = sample.images["target"].grid
            [latent] = generator.autoencoder.encode([torch.from_numpy(request.target)])
            sample.images["target"] = ImageTokens(grid, None, latent.cpu().numpy())
            sample.time_seed = request.seed + 1
            samples.append(sample)
        batch = pack(samples).to(generator.autoencoder.device)
        assert batch.latents is not None
        step = add_noise(batch, batch.latents * generator.autoencoder.scale, flow)
        loss = velocity_loss(generator.model(batch, step.latents, step.time).velocity, step.velocity)
        losses += loss.split([rows * columns for rows, columns in batch.grids[ImageRole.TARGET]])
        velocities.append(step.velocity)
    velocity = torch.cat(velocities)
    baseline = float((velocity - velocity.mean(0)).square().mean())
    means = [float(loss.mean()) for loss in losses]
    stderr = cluster_stderr(means, [r.key.partition("/")[0] for r in requests])
    mean = float(torch.cat(losses).mean())
    score = make_score(f"velocity loss: {task}", mean, baseline, "mean squared error", len(requests), stderr)
    return {**score, "split": split, "task": task, "metric": "velocity_loss", "higher_is_better": False}


def neighbour_scores(
    generator: Generator, split: str, requests: Sequence[Request], latents: Sequence[Tensor], real: Sequence[Request]
) -> list[dict[str, Any]]:
    """Share of the images generated for the requests (`latents`) whose nearest real image has the prompted label.

    Only prompts and real images of one concept count.
    """
    pairs = [(r, x) for r, x in zip(requests, latents, strict=True) if _is_lone(r)]
    known = [r for r in real if r.target is not None and _is_lone(r)]
    if not pairs or not known:
        return []
    encoded = generator.autoencoder.encode([torch.from_numpy(r.target) for r in known])
    nearest = torch.cdist(_flat([x for _, x in pairs]), _flat(encoded)).argmin(1).tolist()
    scores = []
    for label in ("concepts", "style", "background"):
        wanted = [r.labels.get(label) for r, _ in pairs]
        real_labels = [r.labels.get(label) for r in known]
        hits = [float(real_labels[n] == w) for n, w in zip(nearest, wanted, strict=True)]
        chance = sum(real_labels.count(w) for w in wanted) / (len(wanted) * len(real_labels))
        stderr = share_stderr(hits, [r.key.partition("/")[0] for r, _ in pairs])
        name = label.removesuffix("s")
        score = make_score(f"nearest image: {name}", float(np.mean(hits)), chance, "share of images", len(hits), stderr)
        scores.append({**score, "split": split, "task": "t2i", "metric": f"nearest_{name}"})
    return scores


def _is_lone(request: Request) -> bool:
    return len(request.labels.get("concepts", [])) == 1


def _batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]


def _flat(latents: Sequence[Tensor]) -> Tensor:
    return torch.stack([latent.float().flatten().cpu() for latent in latents])
