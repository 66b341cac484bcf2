"""Builds the emoji data set from the npm package `fluentui-emoji`: single drawings, edit pairs and STEM images, in
three splits."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.emoji.chinese import check_words
from data_pipelines.emoji.concepts import Amounts, EmojiWorld
from data_pipelines.emoji.drawing_sheet import make_sheet, write_sheet
from data_pipelines.emoji.drawings import Catalogue, Drawing, select_drawings
from data_pipelines.emoji.edits import EDITS, DrawingPool, make_edit
from data_pipelines.emoji.prompts import PROMPT_MAKERS, make_prompt
from data_pipelines.emoji.records import RecordMaker
from data_pipelines.emoji.scenes import BACKGROUNDS, BIG_SIZES, OFF_CENTRE_SIZE, SMALL_SIZE, Layer, Scene
from data_pipelines.emoji.seeded_rng import pick, seeded_generator
from data_pipelines.emoji.splits import SPLITS, allowed_drawings, split_drawings
from data_pipelines.emoji.stem import StemImage, make_stem, with_all_values
from data_pipelines.shards.write import Record, ShardWriter, webp
from emma_train.errors import UserError

log = logging.getLogger(__name__)

EDIT_KINDS = tuple(EDITS)
PROMPT_KINDS = tuple(PROMPT_MAKERS)
STEM_ATTEMPTS = 200


@dataclass(frozen=True)
class BuildSettings:
    """How images are rendered and stored; written to the manifest under these names."""

    side: int = 128
    """Pixels."""
    seed: int = 0
    quality: int = 70
    """WebP quality."""
    shard_samples: int = 1000
    """Records per tar."""


def build_set(catalogue: Catalogue, world: EmojiWorld, out: Path, settings: BuildSettings) -> dict[str, Amounts]:
    """Write `out/SPLIT/*.tar` for the three splits, and the sheet of a tiny world's drawings; returns the number of
    records of each by kind.

    Raises UserError if `out` already has shards.
    """
    if any(out.glob("*/*.tar")):
        raise UserError(f"{out}: already holds shards; give an empty folder or remove them")
    drawings = select_drawings(catalogue.drawings, world.concepts, world.tones)
    report_unmatched(catalogue, drawings)
    split = split_drawings(drawings)
    if world.chinese:
        check_words(world.concepts)
    options = (world.captions, world.scene_captions, world.in_steps, world.chinese)
    maker = RecordMaker(settings.side, catalogue.version, *options)
    done = {}
    for name in SPLITS:
        drawings_of_split = [d for d in drawings if split[d] == name]
        pool = DrawingPool(allowed_drawings(drawings, split, name))
        amounts: Amounts = getattr(world, name)
        if not drawings_of_split:
            log.warning("%s: none of the %d drawings belongs to it, so it is left out", name, len(drawings))
            continue
        with ShardWriter(out / name, max_samples=settings.shard_samples) as writer:
            for key, record, images in make_records(name, drawings_of_split, pool, amounts, maker, settings.seed):
                files = {name: webp(image, settings.quality) for name, image in images.items()}
                writer.write(key, record, files)
                if writer.samples % 1000 == 0:
                    log.info("%s: %d records", name, writer.samples)
        log.info("%s: %d records in %d shards", name, writer.samples, len(writer.shards))
        done[name] = amounts
    if world.concepts is not None:  # all of the package's drawings would be one huge image
        write_sheet(out, make_sheet(drawings))
    return done


def provenance(catalogue: Catalogue, world: EmojiWorld, settings: BuildSettings, split: str) -> dict[str, Any]:
    """The provenance entry of a split's manifest: sources of its images and the settings they were made with."""
    return {
        "sources": [
            {"dataset": "fluentui-emoji", "version": catalogue.version, "licence": "MIT"},
            {"dataset": "emma-stem", "version": "1", "licence": "Apache-2.0"},
        ],
        "split": split,
        "world": world.name,
        **({"answers": "steps"} if world.in_steps else {}),
        **({"chinese": True} if world.chinese else {}),
        **asdict(settings),
    }


def report_unmatched(catalogue: Catalogue, drawings: list[Drawing]) -> None:
    """Log how many concepts of the package have no group, and which of them this set uses."""
    log.info("%d concepts of the package are not in the Unicode table", len(catalogue.unmatched))
    groupless = sorted({d.concept for d in drawings if d.group is None})
    if groupless:
        log.warning("no question asks for the group of %d concepts: %s", len(groupless), ", ".join(groupless))


KeyedRecord = tuple[str, Record, dict[str, Image.Image]]
"""Key, record and images by name."""


def make_records(
    split: str, drawings: list[Drawing], pool: DrawingPool, amounts: Amounts, maker: RecordMaker, seed: int
) -> Iterator[KeyedRecord]:
    """All records of a split, in the order of their keys' hashes, so that every shard mixes the kinds evenly.

    `drawings` are those of this split alone; each single or pair shows one of them. `pool` has all drawings that an
    image of the split may show.
    """
    by_concept: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        by_concept[drawing.concept].append(drawing)
    concepts = list(by_concept.values())
    stems = distinct_stems(split, amounts.stem, seed)
    jobs = [("single", i) for i in range(amounts.singles)]
    jobs += [("pair", i) for i in range(amounts.pairs)]
    jobs += [("stem", i) for i in range(len(stems))]
    jobs += [("scene", i) for i in range(amounts.scenes)]
    keyed = {f"{split}-{kind}-{i:06d}": (kind, i) for kind, i in jobs}
    for key in sorted(keyed, key=lambda k: hashlib.sha256(k.encode()).digest()):
        kind, i = keyed[key]
        rng = seeded_generator(seed, key)
        if kind == "stem":
            yield key, *maker.stem(stems[i])
        elif kind == "single":
            drawing = take_turn(concepts, i)
            yield key, *maker.single(rng, single_scene(rng, drawing))
        elif kind == "scene":
            lead = take_turn(concepts, i // len(PROMPT_KINDS))
            prompt = make_prompt(rng, PROMPT_KINDS[i % len(PROMPT_KINDS)], lead, pool)
            yield key, *maker.prompt(rng, prompt, lead)
        else:
            edit_kind = EDIT_KINDS[i % len(EDIT_KINDS)]
            leads = with_skin_tones(concepts) if edit_kind == "recolour" else concepts
            lead = take_turn(leads or concepts, i // len(EDIT_KINDS))
            yield key, *maker.pair(rng, make_edit(rng, edit_kind, lead, pool), lead)


def take_turn(concepts: list[list[Drawing]], i: int) -> Drawing:
    """The i-th drawing if concepts take turns, and the drawings of a concept do so too."""
    members = concepts[i % len(concepts)]
    return members[i // len(concepts) % len(members)]


def with_skin_tones(concepts: list[list[Drawing]]) -> list[list[Drawing]]:
    """Only the drawings that exist in several skin tones (those in high contrast exist in one)."""
    colourful = [[d for d in members if d.tone is not None and d.style != "high-contrast"] for members in concepts]
    return [members for members in colourful if members]


def single_scene(rng: np.random.Generator, drawing: Drawing) -> Scene:
    """A scene of one drawing: usually big in the centre, sometimes small, otherwise at a side."""
    position = pick(rng, ("centre",) * 6 + ("left", "right", "top", "bottom"))
    size = OFF_CENTRE_SIZE if position != "centre" else pick(rng, (*BIG_SIZES, *BIG_SIZES, SMALL_SIZE))
    return Scene(pick(rng, list(BACKGROUNDS)), (Layer(drawing, position, size),))


def distinct_stems(split: str, count: int, seed: int) -> list[StemImage]:
    """Up to `count` different STEM images whose content belongs to the split (held out or not)."""
    heldout = split != SPLITS[0]
    distinct: dict[str, StemImage] = {}
    for i in range(count * STEM_ATTEMPTS):
        if len(distinct) == count:
            break
        stem = make_stem(seeded_generator(seed, f"{split}-stem/{i}"))
        if stem.is_heldout == heldout:
            distinct.setdefault(stem.content, stem)
    if len(distinct) < count:
        log.warning("%s: only %d different STEM images exist, %d were asked for", split, len(distinct), count)
    return list(distinct.values())


def unseen_stems(num_questions: int, num_train: int, seed: int) -> list[StemImage]:
    """Different STEM images with `num_questions` questions or a few more.

    None of them is among the `num_train` that a data set of this seed has in train. A bar chart is asked for each of
    its values.
    """
    train = {stem.content for stem in distinct_stems(SPLITS[0], num_train, seed)}
    unseen: dict[str, StemImage] = {}
    missing = num_questions
    for draw in range(num_questions * STEM_ATTEMPTS):
        if missing <= 0:
            break
        stem = make_stem(seeded_generator(seed, f"unseen-stem/{draw}"))
        if stem.content not in train and stem.content not in unseen:
            unseen[stem.content] = with_all_values(stem)
            missing -= len(unseen[stem.content].questions)
    return list(unseen.values())
