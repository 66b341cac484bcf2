"""What each sample costs, as arrays over many samples, computed from the rows of shard indexes.

A sample can be too long for a pack. If it makes text and its images have native resolution, its images are
resized to the tokens that its text leaves free. Any other is marked too long, and the planner replaces it. It also
replaces samples with an image that the recipe does not want (unsuitable).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.shards.index import CAPTIONS
from emma_train.config.schema import ImageConfig, ModelConfig
from emma_train.flops.formulas import decoder_layer_macs, vision_layer_macs
from emma_train.sequence.geometry import image_size, is_suitable
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.seeds import choice_of
from emma_train.sequence.tasks import TASKS

MIN_IMAGE_TOKENS = 16
"""An image is not made smaller than this many visual tokens to let its sample fit a pack."""


@dataclass
class SampleCosts:
    """N samples of one task, with the alternative that an epoch uses of each. Arrays are [N] unless said otherwise."""

    keys: pa.Array
    shard: np.ndarray
    """int32: index into `shards`."""
    shards: list
    """(URL, sha256) of each shard."""
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    alternative: np.ndarray
    num_tokens: np.ndarray
    """int64: LLM tokens before any condition dropout."""
    num_visual: np.ndarray
    """int64: visual tokens that the vision encoder sees."""
    sizes: np.ndarray
    """int64 [caps, N]: what counts against each cap of a pack; LLM tokens first."""
    cost: np.ndarray
    """float64: forward work, in units of one LLM token of the decoder."""
    max_tokens: np.ndarray
    """int64: limit of visual tokens per image that makes the sample fit a pack; 0 if it fits without."""
    too_long: np.ndarray
    """bool: fits no pack."""
    unsuitable: np.ndarray
    """bool: an image is smaller than the recipe's min_side or longer than its max_aspect."""
    stem: np.ndarray
    """int8: 1 for the tag stem, 0 for general, -1 for neither. The index decides: a selection may add tags to it."""
    captions: pa.Array | None = None
    """Text of the alternative where that is a caption of a selection, else null; None if there are none."""
    folders: list = field(default_factory=list)
    """Folder of the source of each shard; empty where no one asks for sources."""

    @property
    def usable(self) -> np.ndarray:
        """bool: neither too long nor unsuitable."""
        return ~(self.too_long | self.unsuitable)

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True)
class CostModel:
    """What the costs of one task's samples depend on."""

    task: str
    image_config: ImageConfig
    """How the task's images are resized."""
    model: ModelConfig
    caps: dict[str, int]
    """Caps of a pack by name: tokens, and those that the recipe sets of pairs, patches and pixels."""
    seed: int
    """data.seed."""
    text_tokens: int = 0
    """Text tokens of every sample where they do not depend on the record; 0 takes those of the index."""
    added_text_tokens: int = 0
    """Most text tokens that the recipe's chat template and caption questions add to those of the index."""


def sample_costs(
    tables: Sequence[pa.Table], shards: Sequence[tuple[str, str]], epoch: int, cost_model: CostModel
) -> SampleCosts:
    """Costs of all rows of some shards: one index table per shard, in order, with columns as in index.INDEX_COLUMNS."""
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    keys = _array(table, "key")
    texts, num_texts = _flatten_lists(table, "text_tokens")
    alternative = _alternatives(keys, num_texts, epoch, cost_model)
    chosen = np.cumsum(num_texts) - num_texts + alternative
    text = texts[chosen].astype(np.int64) + cost_model.added_text_tokens
    if cost_model.text_tokens:
        text = np.full_like(text, cost_model.text_tokens)
    images = _count_visual(table, chosen, cost_model)
    rules = image_rules(cost_model.model)
    max_tokens = _shrink_images(text, images, cost_model, rules.tokens_per_cell)

    model, num_visual = cost_model.model, images.num_visual
    num_shown = rules.tokens_per_cell * num_visual
    num_tokens = text + num_shown + images.num_target
    num_encoded = num_visual * (model.fusion != "latent")
    pairs = _attention_pairs(cost_model.task, text, num_shown, images.num_target, rules.full_und)
    counted = {
        "tokens": num_tokens,
        "pairs": pairs,
        "patches": num_encoded * model.vision.shuffle**2,
        "pixels": (num_visual + images.num_target) * model.autoencoder.pixels**2,
    }
    sizes = np.stack([counted[name] for name in cost_model.caps])
    return SampleCosts(
        keys=keys,
        shard=np.repeat(np.arange(len(tables), dtype=np.int32), [len(t) for t in tables]),
        shards=list(shards),
        offset=np.asarray(_array(table, "offset")),
        size=np.asarray(_array(table, "size")),
        crc32=np.asarray(_array(table, "crc32")),
        alternative=alternative,
        num_tokens=num_tokens,
        num_visual=num_visual,
        sizes=sizes,
        cost=forward_cost(model, num_tokens, pairs, num_encoded, images.patch_pairs * (num_encoded > 0)),
        max_tokens=max_tokens,
        too_long=np.any(sizes > np.asarray(list(cost_model.caps.values()))[:, None], axis=0),
        unsuitable=images.unsuitable,
        stem=_stem_labels(table),
        captions=_chosen_captions(table, alternative, num_texts),
    )


def forward_cost(
    model: ModelConfig, num_tokens: np.ndarray, pairs: np.ndarray, num_visual: np.ndarray, patch_pairs: np.ndarray
) -> np.ndarray:
    """Forward work of samples, in units of one LLM token of the decoder.

    The autoencoder's work is left out: it is proportional to the visual tokens.
    """
    d, v = model.decoder, model.vision
    decoder = decoder_layer_macs(d.hidden, d.heads, d.kv_heads, d.head_dim, d.intermediate_size)
    encoder = vision_layer_macs(v.hidden, v.intermediate_size)
    per_token, per_pair = d.num_layers * decoder.per_token, d.num_layers * decoder.per_pair
    per_patch, per_patch_pair = v.num_used_layers * encoder.per_token, v.num_used_layers * encoder.per_pair
    patches = num_visual * v.shuffle**2
    return num_tokens + (pairs * per_pair + patches * per_patch + patch_pairs * per_patch_pair) / per_token


@dataclass
class _VisualCounts:
    """Counts over the images of N samples; int64 [N] each."""

    num_images: np.ndarray
    """Images that the vision encoder sees."""
    num_visual: np.ndarray
    """Visual tokens of these images."""
    num_target: np.ndarray
    """Visual tokens of the target image; 0 for a sample without."""
    patch_pairs: np.ndarray
    """Pairs of patches in the vision encoder's attention."""
    unsuitable: np.ndarray
    """bool: one of the images is not suitable (geometry.is_suitable)."""


def _alternatives(keys: pa.Array, num_texts: np.ndarray, epoch: int, cost_model: CostModel) -> np.ndarray:
    """int64 [N]: the alternative that an epoch uses of each sample."""
    alternative = np.zeros(len(keys), dtype=np.int64)
    for row in np.flatnonzero(num_texts > 1).tolist():
        choice = f"{cost_model.task} alternative"
        alternative[row] = choice_of(int(num_texts[row]), cost_model.seed, epoch, keys[row].as_py(), choice)
    return alternative


def _count_visual(table: pa.Table, chosen: np.ndarray, cost_model: CostModel) -> _VisualCounts:
    """Counts for the chosen alternative of each row; `chosen` numbers the alternatives of all rows in one sequence."""
    model = cost_model.model
    widths, images_per_row = _flatten_lists(table, "widths")
    heights = _flatten_lists(table, "heights")[0]
    visual, unsuitable = _measure_images(widths, heights, cost_model.image_config, model.autoencoder.pixels)
    first_image = np.cumsum(images_per_row) - images_per_row
    target = _flatten_lists(table, "target")[0][chosen]
    num_target = np.where(target >= 0, _take(visual, first_image + target), 0)
    bad_target = (target >= 0) & _take(unsuitable, first_image + target)
    if TASKS[cost_model.task].shows_target:
        patch_pairs = (num_target * model.vision.shuffle**2) ** 2
        return _VisualCounts((target >= 0).astype(np.int64), num_target, num_target, patch_pairs, bad_target)

    # `context` is a list (alternatives) of lists (images) per row; `image` has an entry per image that is shown.
    context = _array(table, "context").flatten()
    numbers, lengths = np.asarray(context.flatten()), np.asarray(context.value_lengths())
    num_images, starts = lengths[chosen], (np.cumsum(lengths) - lengths)[chosen]
    row_of = np.repeat(np.arange(len(table)), num_images)
    nth = np.arange(len(row_of)) - np.repeat(np.cumsum(num_images) - num_images, num_images)
    shown = first_image[row_of] + numbers[starts[row_of] + nth]
    image = visual[shown]
    patches = image * model.vision.shuffle**2
    return _VisualCounts(
        num_images=num_images,
        num_visual=np.bincount(row_of, image, minlength=len(table)).astype(np.int64),
        num_target=num_target,
        patch_pairs=np.bincount(row_of, patches**2, minlength=len(table)).astype(np.int64),
        unsuitable=bad_target | (np.bincount(row_of, unsuitable[shown], minlength=len(table)) > 0),
    )


def _shrink_images(text: np.ndarray, images: _VisualCounts, cost_model: CostModel, tokens_per_cell: int) -> np.ndarray:
    """int64 [N]: the limit of tokens per image of samples that need one, 0 for others. Changes their counts in place.

    The changed counts are upper bounds: an image below the limit keeps its size.
    """
    limit = np.zeros(len(text), dtype=np.int64)
    if TASKS[cost_model.task].makes_image or cost_model.image_config.mode != "native":
        return limit
    num_tokens, cap = text + tokens_per_cell * images.num_visual + images.num_target, cost_model.caps["tokens"]
    for row in np.flatnonzero(num_tokens > cap).tolist():
        num_images = int(images.num_images[row])
        per_image = (cap - int(text[row])) // (num_images * tokens_per_cell) if num_images else 0
        if per_image >= MIN_IMAGE_TOKENS:
            limit[row] = per_image
            images.num_visual[row] = per_image * num_images
            images.patch_pairs[row] = num_images * (per_image * cost_model.model.vision.shuffle**2) ** 2
    return limit


def _attention_pairs(
    task: str, text: np.ndarray, num_visual: np.ndarray, num_target: np.ndarray, full_und: bool = False
) -> np.ndarray:
    """(query, key) pairs that the decoder's attention computes: understanding is causal unless `full_und`; in
    generation an image attends to all of itself and to all tokens before it.

    An integer upper bound. `pack_work` in emma_train/flops/work.py counts the pairs of a pack exactly. Here,
    exact numbers would put other samples into a pack than earlier versions did, and change the digests of a run.
    """
    if TASKS[task].condition is ImageRole.UND and not full_und:
        return (text + num_visual) ** 2 // 2 + (text + num_visual + num_target) * num_target
    return text**2 // 2 + (text + num_visual) * num_visual + (text + num_visual + num_target) * num_target


def _measure_images(
    widths: np.ndarray, heights: np.ndarray, image_config: ImageConfig, pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image the visual tokens (int64) and whether it is unsuitable (bool).

    Few sizes occur many times, so each is computed once.
    """
    packed, inverse = np.unique(widths.astype(np.int64) << 32 | heights.astype(np.int64), return_inverse=True)
    sizes = [(size >> 32, size & 0xFFFFFFFF) for size in packed.tolist()]
    tokens = [math.prod(image_size(*size, image_config, pixels)) // pixels**2 for size in sizes]
    unsuitable = [not is_suitable(*size, image_config) for size in sizes]
    return np.asarray(tokens, dtype=np.int64)[inverse], np.asarray(unsuitable, dtype=bool)[inverse]


def _chosen_captions(table: pa.Table, alternative: np.ndarray, num_texts: np.ndarray) -> pa.Array | None:
    """Texts of the chosen alternatives that are captions of a selection: the last ones of a row."""
    if CAPTIONS not in table.column_names:
        return None
    column = _array(table, CAPTIONS)
    num_captions = np.asarray(column.value_lengths().fill_null(0))
    first, from_record = np.cumsum(num_captions) - num_captions, num_texts - num_captions
    indices = pa.array(first + alternative - from_record, mask=alternative < from_record)
    return column.flatten().take(indices)


def _stem_labels(table: pa.Table) -> np.ndarray:
    """int8 [N]: 1, 0 or -1, as SampleCosts has them."""
    labels = np.full(len(table), -1, dtype=np.int8)
    if "tags" not in table.column_names:
        return labels
    tags = _array(table, "tags")
    rows = np.repeat(np.arange(len(table)), np.asarray(tags.value_lengths().fill_null(0)))
    for tag, label in (("general", 0), ("stem", 1)):
        labels[rows[np.asarray(pc.equal(tags.flatten(), tag))]] = label
    return labels


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _flatten_lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, and the length of each list."""
    array = _array(table, name)
    return np.asarray(array.flatten()), np.asarray(array.value_lengths())


def _take(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """values[indices]; an index out of range gives an arbitrary value, which the caller must not use."""
    return values[np.clip(indices, 0, len(values) - 1)] if len(values) else np.zeros_like(indices)
