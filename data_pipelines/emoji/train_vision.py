"""Trains the demo's tiny vision encoder: a `transformers.SiglipVisionModel` of the recipe's sizes, on a set's train.

    python -m data_pipelines.emoji.train_vision --data runs/emoji --out siglip2 --minutes 6

SigLIP's sigmoid loss between images and captions, with a small text tower that is not stored. The set has many images
of one scene, so every caption of a batch counts as right for every image whose caption says the same. Retrieval is
measured on images of drawings that train does not have, with the weights as stored (bf16), in fp32 arithmetic.
"""

import argparse
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig, SiglipVisionModel

from data_pipelines.emoji.foundation import (
    Measures,
    SplitRecord,
    minimise,
    random_batches,
    read_split,
    run_training,
)
from data_pipelines.emoji.splits import HELDOUT_DRAWINGS, TRAIN
from data_pipelines.shards.images import load_image, open_image
from emma_train.config.schema import Recipe, VisionConfig
from emma_train.sequence.tokens import TextTokenizer

log = logging.getLogger(__name__)

BATCH_IMAGES = 96
TEXT_LAYERS = 2
TEXT_TOKENS = 32
"""Every text is padded to as many tokens, because SigLIP takes the last position for the text's meaning."""
FIRST_SCALE, FIRST_BIAS = 20.0, -10.0
"""At first all pairs are taken for wrong ones, as most are. SigLIP starts from 10 and -10; a few hundred steps move the
scale too little."""
FUNCTION_WORDS = {"a", "an", "the", "on", "at", "in", "with", "style", "background"}


@dataclass(frozen=True)
class CaptionedImage:
    """An image file of `side` x `side` pixels and its captions, which all say the same."""

    file: bytes
    captions: tuple[str, ...]

    @property
    def meaning(self) -> tuple[str, ...]:
        return meaning(self.captions[0])

    def pixels(self, side: int) -> Tensor:
        """float32 [3, side, side] in [-1, 1]."""
        pixels = np.array(load_image(open_image(self.file), side, side))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def meaning(caption: str) -> tuple[str, ...]:
    """What all captions of one scene share: their words in alphabetical order, without those that only join them."""
    return tuple(sorted(set(re.findall(r"[^\s,]+", caption)) - FUNCTION_WORDS))


def captioned_images(records: Iterable[SplitRecord]) -> Iterator[CaptionedImage]:
    """The images of records that are described: by captions, or a formula or chart by its content."""
    for record, files in records:
        labels = record["labels"]
        captions: dict[str, list[str]] = {name: [] for name in files}
        for alternative in record.get("t2i", []):
            captions[alternative["target"]].append(alternative["text"])
        if "stem" in labels:
            captions["img0"].append(f"{labels['stem']} {labels.get('formula', labels.get('values'))}")
        yield from (CaptionedImage(files[name], tuple(texts)) for name, texts in captions.items() if texts)


def contrastive_model(vision: VisionConfig, tokenizer: TextTokenizer) -> SiglipModel:
    """A SiglipModel of the recipe's vision encoder and a text tower of the same width."""
    width = {
        "hidden_size": vision.hidden,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.eps,
    }
    images = SiglipVisionConfig(
        num_hidden_layers=vision.num_layers,
        image_size=vision.position_grid * vision.patch,
        patch_size=vision.patch,
        **width,
    )
    texts = SiglipTextConfig(
        num_hidden_layers=TEXT_LAYERS,
        vocab_size=tokenizer.vocab,
        max_position_embeddings=TEXT_TOKENS,
        pad_token_id=tokenizer.endoftext,
        bos_token_id=tokenizer.endoftext,
        eos_token_id=tokenizer.endoftext,
        **width,
    )
    model = SiglipModel(SiglipConfig(text_config=texts.to_dict(), vision_config=images.to_dict()))
    torch.nn.init.constant_(model.logit_scale, math.log(FIRST_SCALE))
    torch.nn.init.constant_(model.logit_bias, FIRST_BIAS)
    return model


def similarities(
    model: SiglipModel, images: Sequence[CaptionedImage], texts: Sequence[str], tokenizer: TextTokenizer
) -> Tensor:
    """Logits of every text for every image: [texts, images]."""
    ids = [(tokenizer.encode_user(text) + [tokenizer.endoftext] * TEXT_TOKENS)[:TEXT_TOKENS] for text in texts]
    pixels = torch.stack([image.pixels(model.config.vision_config.image_size) for image in images])
    return model(input_ids=torch.tensor(ids), pixel_values=pixels).logits_per_text


def sigmoid_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """SigLIP's loss: the sum over the images, the mean over the texts. Both are [texts, images]; `fits` is of bools."""
    return -F.logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()


def same_meaning(images: Sequence[CaptionedImage]) -> Tensor:
    """bool [images, images]: whether the captions of two images say the same."""
    meanings = [image.meaning for image in images]
    return torch.tensor([[one == other for other in meanings] for one in meanings])


def train_vision(
    images: Sequence[CaptionedImage],
    vision: VisionConfig,
    tokenizer: TextTokenizer,
    minutes: float,
    seed: int = 0,
    steps: int | None = None,
) -> tuple[SiglipModel, list[float]]:
    """Returns the model with its text tower, and the loss of each step."""
    model = contrastive_model(vision, tokenizer)
    batches, rng = random_batches(len(images), BATCH_IMAGES, seed), np.random.default_rng(seed)

    def next_loss() -> Tensor:
        batch = [images[index] for index in next(batches)]
        texts = [image.captions[rng.integers(len(image.captions))] for image in batch]
        return sigmoid_loss(similarities(model, batch, texts, tokenizer), same_meaning(batch))

    return model, minimise(model, next_loss, minutes, steps)


def save_vision(model: SiglipModel, out: Path) -> SiglipVisionModel:
    """Write a folder of transformers in bf16, without the text tower. Returns the encoder, read back in fp32."""
    deepcopy(model.vision_model).bfloat16().save_pretrained(out)
    return SiglipVisionModel.from_pretrained(out, dtype=torch.float32).eval()


@torch.no_grad()
def retrieval(model: SiglipModel, images: Sequence[CaptionedImage], tokenizer: TextTokenizer) -> Measures:
    """Share of captions whose image is the nearest one, and of images whose caption is, among images that all differ
    in what their captions say; and what chance gives."""
    distinct = list({image.meaning: image for image in images}.values())
    logits = similarities(model, distinct, [image.captions[0] for image in distinct], tokenizer)
    right = torch.arange(len(distinct))
    return {
        "heldout_images": len(distinct),
        "chance": 1 / len(distinct),
        "text_to_image_at_1": float((logits.argmax(1) == right).float().mean()),
        "image_to_text_at_1": float((logits.argmax(0) == right).float().mean()),
    }


def _train_and_measure(options: argparse.Namespace, recipe: Recipe) -> Measures:
    tokenizer = TextTokenizer(recipe.data.tokenizer)
    images = list(captioned_images(read_split(options.data, TRAIN)))
    heldout = list(captioned_images(pair for pair in read_split(options.data, HELDOUT_DRAWINGS) if "t2i" in pair[0]))
    log.info("%d images to train on", len(images))
    model, losses = train_vision(images, recipe.model.vision, tokenizer, options.minutes, options.seed)
    model.vision_model = save_vision(model, options.out)
    num_parameters = model.vision_model.num_parameters()
    base = {"parameters": num_parameters, "steps": len(losses), "minutes": options.minutes}
    return {**base, **retrieval(model.eval(), heldout, tokenizer)}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_training(__doc__ or "", _train_and_measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
