"""`fluentui-emoji` -> a data set of three splits: single drawings, edit pairs and STEM images."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.emoji.concepts import Amounts, World
from data_pipelines.emoji.drawings import Catalogue, Drawing, select
from data_pipelines.emoji.edits import EDITS, Pool, make_edit
from data_pipelines.emoji.records import RecordMaker
from data_pipelines.emoji.rng import generator, pick
from data_pipelines.emoji.scenes import BACKGROUNDS, BIG, PLACED, SMALL, Layer, Scene
from data_pipelines.emoji.splits import SPLITS, allowed, split_drawings
from data_pipelines.emoji.stem import Stem, make_stem
from data_pipelines.shards.write import Record, ShardWriter, webp
from emma_train.errors import UserError

log = logging.getLogger(__name__)

EDIT_KINDS = tuple(EDITS)
STEM_ATTEMPTS = 200


@dataclass(frozen=True)
class Settings:
    """How images are made and packed. `side` in pixels, `quality` is WebP's, `shard_samples` records per tar."""

    side: int = 128
    seed: int = 0
    quality: int = 70
    shard_samples: int = 1000


def build_set(catalogue: Catalogue, world: World, out: Path, settings: Settings) -> dict[str, Amounts]:
    """Writes `out/SPLIT/*.tar` for the three splits; returns what each holds. Refuses a folder that has shards."""
    if any(out.glob("*/*.tar")):
        raise UserError(f"{out}: already holds shards; give an empty folder or remove them")
    drawings = select(catalogue.drawings, world.concepts, world.tones)
    report_unmatched(catalogue, drawings)
    split = split_drawings(drawings)
    maker = RecordMaker(settings.side, catalogue.version, world.captions, world.scene_captions)
    done = {}
    for name in SPLITS:
        own = [d for d in drawings if split[d] == name]
        pool = Pool(allowed(drawings, split, name))
        amounts: Amounts = getattr(world, name)
        if not own:
            log.warning("%s: none of the %d drawings falls in it, so it is left out", name, len(drawings))
            continue
        with ShardWriter(out / name, max_samples=settings.shard_samples) as writer:
            for key, record, images in records(name, own, pool, amounts, maker, settings.seed):
                files = {name: webp(image, settings.quality) for name, image in images.items()}
                writer.write(key, record, files)
                if writer.samples % 1000 == 0:
                    log.info("%s: %d records", name, writer.samples)
        log.info("%s: %d records in %d shards", name, writer.samples, len(writer.shards))
        done[name] = amounts
    return done


def provenance(catalogue: Catalogue, world: World, settings: Settings, split: str) -> dict[str, Any]:
    """Where a split's images come from and how they were made, for its manifest."""
    return {
        "sources": [
            {"dataset": "fluentui-emoji", "version": catalogue.version, "licence": "MIT"},
            {"dataset": "emma-stem", "version": "1", "licence": "Apache-2.0"},
        ],
        "split": split,
        "world": world.name,
        **asdict(settings),
    }


def report_unmatched(catalogue: Catalogue, drawings: list[Drawing]) -> None:
    """Says how many concepts have no group, and names those that matter here."""
    log.info("%d concepts of the package are not in the Unicode table", len(catalogue.unmatched))
    groupless = sorted({d.concept for d in drawings if d.group is None})
    if groupless:
        log.warning("no question asks for the group of %d concepts: %s", len(groupless), ", ".join(groupless))


Made = tuple[str, Record, dict[str, Image.Image]]


def records(
    split: str, own: list[Drawing], pool: Pool, amounts: Amounts, maker: RecordMaker, seed: int
) -> Iterator[Made]:
    """All records of a split in the order of their keys' hashes, so that each shard is a fair mix of kinds.

    Singles and pairs lead with the split's `own` drawings, concept after concept and drawing after drawing.
    """
    by_concept: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in own:
        by_concept[drawing.concept].append(drawing)
    turns = list(by_concept.values())
    stems = distinct_stems(split, amounts.stem, seed)
    jobs = [("single", i) for i in range(amounts.singles)]
    jobs += [("pair", i) for i in range(amounts.pairs)]
    jobs += [("stem", i) for i in range(len(stems))]
    keyed = {f"{split}-{kind}-{i:06d}": (kind, i) for kind, i in jobs}
    for key in sorted(keyed, key=lambda k: hashlib.sha256(k.encode()).digest()):
        kind, i = keyed[key]
        rng = generator(seed, key)
        if kind == "stem":
            yield key, *maker.stem(stems[i])
        elif kind == "single":
            drawing = turn(turns, i)
            yield key, *maker.single(rng, single_scene(rng, drawing))
        else:
            wanted = EDIT_KINDS[i % len(EDIT_KINDS)]
            leads = toned(turns) if wanted == "recolour" else turns
            lead = turn(leads or turns, i // len(EDIT_KINDS))
            yield key, *maker.pair(rng, make_edit(rng, wanted, lead, pool), lead)


def turn(concepts: list[list[Drawing]], i: int) -> Drawing:
    """The i-th drawing when concepts take turns, and within a concept its drawings."""
    members = concepts[i % len(concepts)]
    return members[i // len(concepts) % len(members)]


def toned(concepts: list[list[Drawing]]) -> list[list[Drawing]]:
    """Only the drawings that come in several skin tones (high contrast comes in one)."""
    colourful = [[d for d in members if d.tone is not None and d.style != "high-contrast"] for members in concepts]
    return [members for members in colourful if members]


def single_scene(rng: np.random.Generator, drawing: Drawing) -> Scene:
    """Half of the images show the drawing big in the centre, a tenth small, the others at a side."""
    place = pick(rng, ("centre",) * 6 + ("left", "right", "top", "bottom"))
    size = PLACED if place != "centre" else pick(rng, (*BIG, *BIG, SMALL))
    return Scene(pick(rng, list(BACKGROUNDS)), (Layer(drawing, place, size),))


def distinct_stems(split: str, count: int, seed: int) -> list[Stem]:
    """Up to `count` different STEM images whose content belongs to the split (held out or not)."""
    heldout = split != SPLITS[0]
    found: dict[str, Stem] = {}
    for i in range(count * STEM_ATTEMPTS):
        if len(found) == count:
            break
        stem = make_stem(generator(seed, f"{split}-stem/{i}"))
        if stem.is_heldout == heldout:
            found.setdefault(stem.content, stem)
    if len(found) < count:
        log.warning("%s: only %d different STEM pictures exist, %d were asked for", split, len(found), count)
    return list(found.values())
