"""Scores on a held-out split with known answers. Every score names its split, its baseline and the value to reach.

- Exact match of answers, per kind of question. Baseline: always the commonest answer.
- Velocity loss of flow matching on the split's images. Baseline: the mean velocity.
- Share of generated images whose nearest real image, in latent space, has the prompted concept, style or background.
  Baseline: a real image picked at random.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import FlowConfig, Recipe
from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.objectives.flow import add_noise, velocity_loss
from emma_train.sequence.pack import ImageTokens, pack
from emma_train.sequence.request import Request, as_sample
from emma_train.sequence.tasks import tasks_of_loss

BATCH = 32
BAR_SPLIT = "heldout_drawings"
FEWEST = 10
"""Kinds of question that a split asks less often have no score."""
GROUP_BAR = 0.60
VELOCITY_BAR = 0.60
"""Group answers: at least 60 % right. Velocity loss: at most 60 % of the baseline's."""


def score_split(
    generator: Generator,
    split: str,
    requests: dict[str, list[Request]],
    seen: list[Request],
    recipe: Recipe,
    limit: int,
) -> list[dict[str, Any]]:
    """All scores of a split. `requests`: by task; `seen`: training images that may be nearest neighbours too; `limit`:
    number of images to generate, 0 for all.

    Only BAR_SPLIT, with new drawings of concepts of the training set, has values to reach: a model cannot name a
    concept whose name it was not trained on.
    """
    scores = answer_scores(generator, requests["i2t"])
    for task in tasks_of_loss("flow"):
        if requests.get(task):
            scores.append(velocity_score(generator, requests[task], recipe.flow, task))
    lone = [r for r in requests["t2i"] if len(r.labels.get("concepts", [])) == 1]
    scores += neighbour_scores(generator, lone, [*seen, *lone], FlowSettings.of(recipe), limit)
    has_bar = split == BAR_SPLIT
    return [{**score, "split": split, "bar": score["bar"] if has_bar else None} for score in scores]


def answer_scores(generator: Generator, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Exact match per kind of question."""
    scores = []
    for kind in sorted({r.kind for r in requests}):
        asked = [r for r in requests if r.kind == kind]
        if len(asked) < FEWEST:
            continue
        answers = [a for batch in _batches(asked) for a in generator.generate_text(batch, TextSettings(max_tokens=12))]
        right = sum(a.strip() == r.truth for a, r in zip(answers, asked, strict=True))
        commonest = Counter(r.truth for r in asked).most_common(1)[0][1]
        score = _score(f"answer: {kind}", right / len(asked), commonest / len(asked), "exact match", len(asked))
        scores.append({**score, "bar": GROUP_BAR} if kind == "group" else score)
    return scores


@torch.no_grad()
def velocity_score(generator: Generator, requests: Sequence[Request], flow: FlowConfig, task: str) -> dict[str, Any]:
    """Mean velocity loss over the requests' targets, and that of predicting the mean velocity of each channel."""
    losses, velocities = [], []
    for asked in _batches(requests):
        samples = []
        for request, latents in zip(asked, generator.latents_of(asked), strict=True):
            assert request.target is not None
            sample = as_sample(request, generator.tokenizer, generator.patch, generator.shuffle, latents)
            grid = sample.images["target"].grid
            [latent] = generator.autoencoder.encode([torch.from_numpy(request.target)])
            sample.images["target"] = ImageTokens(grid, None, latent.cpu().numpy())
            sample.time_seed = request.seed + 1
            samples.append(sample)
        batch = pack(samples).to(generator.autoencoder.device)
        assert batch.latents is not None
        step = add_noise(batch, batch.latents * generator.autoencoder.scale, flow)
        losses.append(velocity_loss(generator.model(batch, step.latents, step.time).velocity, step.velocity))
        velocities.append(step.velocity)
    velocity = torch.cat(velocities)
    baseline = float((velocity - velocity.mean(0)).square().mean())
    score = _score(
        f"velocity loss: {task}", float(torch.cat(losses).mean()), baseline, "mean squared error", len(requests)
    )
    return {**score, "higher_is_better": False, "bar": VELOCITY_BAR * baseline}


def neighbour_scores(
    generator: Generator, requests: Sequence[Request], real: Sequence[Request], settings: FlowSettings, limit: int
) -> list[dict[str, Any]]:
    """Generate an image for each request; share of them whose nearest real image has the prompted label."""
    requests = requests[: limit or None]
    if not requests:
        return []
    made = [x for asked in _batches(requests) for x in generator.generate_latents(asked, settings)]
    known = [r for r in real if r.target is not None and len(r.labels.get("concepts", [])) == 1]
    encoded = generator.autoencoder.encode([torch.from_numpy(r.target) for r in known])
    nearest = torch.cdist(_flat(made), _flat(encoded)).argmin(1).tolist()
    scores = []
    for label in ("concepts", "style", "background"):
        wanted = [r.labels.get(label) for r in requests]
        real_labels = [r.labels.get(label) for r in known]
        hits = sum(real_labels[n] == w for n, w in zip(nearest, wanted, strict=True)) / len(wanted)
        chance = sum(real_labels.count(w) for w in wanted) / (len(wanted) * len(real_labels))
        scores.append(_score(f"nearest image: {label.removesuffix('s')}", hits, chance, "share of images", len(wanted)))
    return scores


def _score(name: str, value: float, baseline: float, unit: str, num: int) -> dict[str, Any]:
    score = {"name": name, "value": value, "baseline": baseline, "unit": unit, "num": num}
    return {**score, "bar": None, "higher_is_better": True}


def _batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]


def _flat(latents: Sequence[Tensor]) -> Tensor:
    return torch.stack([latent.float().flatten().cpu() for latent in latents])
