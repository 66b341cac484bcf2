"""Rows of shard indexes as columns of numbers: what each sample would cost, for planning by the hundred thousand.

A sample that is too long for a pack shrinks its images to what the text leaves them, if it is one to be understood at
native resolution; any other is refused, and the planner puts another in its place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from emma_train.config.schema import ImageConfig, ModelConfig
from emma_train.flops.formulas import decoder_layer_macs, vision_layer_macs
from emma_train.sequence.geometry import image_size
from emma_train.sequence.seeds import choice_of

LEAST_IMAGE_TOKENS = 16
"""Visual tokens to which an image may be shrunk so that its sample fits a pack."""


@dataclass
class SampleCosts:
    """N rows of one task, with the alternative that an epoch takes of each."""

    keys: pa.Array
    shard: np.ndarray
    """int32: index into the shards that were read."""
    shards: list
    """(URL, sha256) of each."""
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    alternative: np.ndarray
    tokens: np.ndarray
    """int64: LLM tokens before any condition dropout."""
    seen: np.ndarray
    """int64: visual tokens that the vision encoder sees."""
    sizes: np.ndarray
    """int64 [caps, N]: what counts against each cap of a pack; LLM tokens first."""
    cost: np.ndarray
    """float64: forward work in LLM tokens of the decoder."""
    shrunk: np.ndarray
    """int64: cap of visual tokens per image where the sample was too long otherwise; 0 elsewhere."""
    refused: np.ndarray
    """bool: too long for any pack."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class CostModel:
    """How a task's rows are measured."""

    task: str
    image_config: ImageConfig
    """How its images are resized."""
    model: ModelConfig
    caps: dict[str, int]
    """Caps of a pack by name: tokens, and any of pairs, patches and pixels."""
    seed: int
    """data.seed."""


def sample_costs(
    tables: Sequence[pa.Table], shards: Sequence[tuple[str, str]], epoch: int, how: CostModel
) -> SampleCosts:
    """Columns of the rows of some shards, one table each, one after another. Columns of a table as in index.COLUMNS."""
    table = pa.concat_tables(tables).combine_chunks()
    shard = np.repeat(np.arange(len(tables), dtype=np.int32), [len(t) for t in tables])
    keys = _array(table, "key")
    texts, num_texts = _lists(table, "text_tokens")
    alternative = np.zeros(len(table), dtype=np.int64)
    for row in np.flatnonzero(num_texts > 1).tolist():
        key = keys[row].as_py()
        alternative[row] = choice_of(int(num_texts[row]), how.seed, epoch, key, f"{how.task} alternative")
    chosen = np.cumsum(num_texts) - num_texts + alternative

    widths, num_images = _lists(table, "widths")
    visual = _visual_tokens(widths, _lists(table, "heights")[0], how.image_config, how.model.autoencoder.pixels)
    first_image = np.cumsum(num_images) - num_images
    target = _lists(table, "target")[0][chosen]
    made = np.where(target >= 0, _at(visual, first_image + target), 0)

    context = _array(table, "context").flatten()
    numbers, lengths = np.asarray(context.flatten()), np.asarray(context.value_lengths())
    shown, which = lengths[chosen], (np.cumsum(lengths) - lengths)[chosen]
    row_of = np.repeat(np.arange(len(table)), shown)
    nth = np.arange(len(row_of)) - np.repeat(np.cumsum(shown) - shown, shown)
    image = visual[first_image[row_of] + numbers[which[row_of] + nth]]
    seen = np.bincount(row_of, image, minlength=len(table)).astype(np.int64)
    text = texts[chosen].astype(np.int64)
    vision = how.model.vision
    patches = np.bincount(row_of, (image * vision.shuffle**2) ** 2, minlength=len(table)).astype(np.int64)
    shrunk, tokens = np.zeros(len(table), dtype=np.int64), text + seen + made
    for row in np.flatnonzero(tokens > how.caps["tokens"]).tolist() if how.task == "i2t" else ():
        if how.image_config.mode == "native" and (cap := _shrunk(how.caps["tokens"] - int(text[row]), int(shown[row]))):
            # Upper bounds: an image under the cap stays as it is.
            shrunk[row], seen[row] = cap, cap * shown[row]
            tokens[row], patches[row] = text[row] + seen[row], shown[row] * (cap * vision.shuffle**2) ** 2
    pairs = _pairs(how.task, text, seen, made)
    counted = {
        "tokens": tokens,
        "pairs": pairs,
        "patches": seen * vision.shuffle**2,
        "pixels": (seen + made) * how.model.autoencoder.pixels**2,
    }
    sizes = np.stack([counted[name] for name in how.caps])
    return SampleCosts(
        keys=keys,
        shard=shard,
        shards=list(shards),
        offset=np.asarray(_array(table, "offset")),
        size=np.asarray(_array(table, "size")),
        crc32=np.asarray(_array(table, "crc32")),
        alternative=alternative,
        tokens=tokens,
        seen=seen,
        sizes=sizes,
        cost=cost(how.model, tokens, pairs, seen, patches),
        shrunk=shrunk,
        refused=np.any(sizes > np.asarray(list(how.caps.values()))[:, None], axis=0),
    )


def cost(
    model: ModelConfig, tokens: np.ndarray, pairs: np.ndarray, seen: np.ndarray, patch_pairs: np.ndarray
) -> np.ndarray:
    """Forward work of samples in LLM tokens of the decoder. DC-AE's goes with the visual tokens and is left out."""
    d, v = model.decoder, model.vision
    decoder = decoder_layer_macs(d.hidden, d.heads, d.kv_heads, d.head_dim, d.intermediate_size)
    encoder = vision_layer_macs(v.hidden, v.intermediate_size)
    per_token, per_pair = d.num_layers * decoder.per_token, d.num_layers * decoder.per_pair
    per_patch, per_patch_pair = v.num_layers * encoder.per_token, v.num_layers * encoder.per_pair
    patches = seen * v.shuffle**2
    return tokens + (pairs * per_pair + patches * per_patch + patch_pairs * per_patch_pair) / per_token


def _shrunk(room: int, images: int) -> int:
    """Visual tokens to which each of so many images shrinks so that all fit the room; 0 where that is too little."""
    cap = room // images if images else 0
    return cap if cap >= LEAST_IMAGE_TOKENS else 0


def _pairs(task: str, text: np.ndarray, seen: np.ndarray, made: np.ndarray) -> np.ndarray:
    """(query, key) pairs that attention computes: understanding is a triangle; in generation each image is a square
    beside what came before it.

    An upper bound in whole numbers. `pack_work` in emma_train/flops/work.py counts the pairs of a pack exactly. Here,
    exact numbers would put other samples into a pack than earlier versions did, and change the digests of a run.
    """
    if task == "i2t":
        return (text + seen) ** 2 // 2
    return text**2 // 2 + (text + seen) * seen + (text + seen + made) * made


def _visual_tokens(widths: np.ndarray, heights: np.ndarray, image_config: ImageConfig, pixels: int) -> np.ndarray:
    """int64 per image. The same few sizes come again and again; each is computed once."""
    sizes, inverse = np.unique(widths.astype(np.int64) << 32 | heights.astype(np.int64), return_inverse=True)
    areas = (image_size(size >> 32, size & 0xFFFFFFFF, image_config, pixels) for size in sizes.tolist())
    return np.asarray([math.prod(area) // pixels**2 for area in areas], dtype=np.int64)[inverse]


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, and the length of each list."""
    array = _array(table, name)
    return np.asarray(array.flatten()), np.asarray(array.value_lengths())


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values[index], and anything where the index leads nowhere."""
    return values[np.clip(index, 0, len(values) - 1)] if len(values) else np.zeros_like(index)
