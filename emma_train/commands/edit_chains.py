"""Edits one after another, each of the image that the one before it made, judged after each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from emma_train.generate.scores import decoded_images, generated_latents
from emma_train.sequence.seeds import seed_of

if TYPE_CHECKING:
    from data_pipelines.emoji.exact import ImageJudge, Judgement
    from emma_train.generate.generator import Generator
    from emma_train.generate.settings import FlowSettings
    from emma_train.sequence.request import Request


def judged_chains(
    generator: "Generator",
    judge: "ImageJudge",
    split: str,
    edits: Sequence["Request"],
    num_edits: int,
    settings: "FlowSettings",
) -> list["Judgement"]:
    """Judgements of the images after the first edit of each chain, after the second, and so on: kinds `chain 1` to
    `chain NUM_EDITS`, all of the same chains."""
    from data_pipelines.emoji.edit_chains import edit_chains

    chains = edit_chains(judge.reader.drawings, split, edits, num_edits)
    images = [chain.request.images[0] for chain in chains]
    judged: list[Judgement] = []
    for step in range(num_edits if chains else 0):
        requests = [
            replace(chain.request, text=chain.texts[step], images=[image], seed=_seed(chain.request, step))
            for chain, image in zip(chains, images, strict=True)
        ]
        images = decoded_images(generator, requests, generated_latents(generator, requests, settings))
        judged += judge.chains(chains, step + 1, images)
    return judged


def _seed(request: "Request", step: int) -> int:
    """Of the noise: the first edit of a chain is that of the request."""
    return seed_of(request.seed, step, request.key, "edit chain") if step else request.seed
