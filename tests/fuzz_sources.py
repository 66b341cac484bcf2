"""Damaged and odd public sets, for every importer, and damaged shards, for the operators that need no model.

    python -m tests.fuzz_sources [--cases 3000] [--minutes 30] [--seed 0] [--only img2dataset]

Each case changes one thing in one file of a small set (tests/odd_content.py), imports it and holds the result against
that of the intact set. Right is: refused in one line; or every item is a record or a reject with a reason, the counts
add up, every record can be indexed, every image decoded, and no record but the changed one differs from the intact
set's. Then one byte of the shards flips and an operator runs: each record has its columns as before or is rejected.
"""

import argparse
import csv
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.prepare.annotate import OperatorChoice, annotate_shard, annotate_tasks
from data_pipelines.prepare.jobs import do_task
from data_pipelines.shards.images import image_members, load_resized
from emma_train.config.schema import ImageConfig
from emma_train.errors import RunError, UserError
from tests import more_public_formats as more
from tests import public_formats as formats
from tests.imported import Imported
from tests.odd_content import change_content, damage_bytes
from tests.shards import png

log = logging.getLogger(__name__)
TIMEOUT_S = 60
MEMORY = 6 << 30
OPERATORS = ("size", "language", "phash", "stem", "quality", "edit-kind")
Row = tuple[dict[str, Any], dict[str, bytes]]
"""Record and members."""


class Hang(BaseException):
    """A case took TIMEOUT_S."""


@dataclass(frozen=True)
class Source:
    """A public set in its format."""

    importer: str
    write: Callable[[Path], Any]
    fields: dict[str, str] = field(default_factory=dict)


def _write_folder(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "sub/c", "sub/d")):
        (folder / f"{name}.png").write_bytes(png(number))
        (folder / f"{name}.txt").write_text(f"caption {number}")


def _write_csv(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        (folder / f"images/{number}.png").write_bytes(png(number))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[f"images/{number}.png", f"a caption, {number}", number] for number in range(4)]
        csv.writer(file).writerows([["file_name", "text", "score"], *rows])


def _write_energon(folder: Path) -> None:
    members = []
    for number, key in enumerate("abcd"):
        value = {"q": f"What is {key}?", "a": ["a", "b"]}
        members += [(f"{key}.jpg", formats.jpeg(number)), (f"{key}.json", json.dumps(value).encode())]
    more.write_energon(folder, "VQASample", {"image": "jpg", "context": "json[q]", "answers": "json[a]"}, members)


SOURCES = {
    "llava-pretrain": Source("llava-pretrain", formats.write_llava_pretrain),
    "llava-onevision": Source("llava-onevision", formats.write_onevision),
    "finevision": Source("finevision", lambda folder: formats.write_finevision(folder, "ai2d", num=4)),
    "img2dataset": Source("img2dataset", formats.write_img2dataset),
    "omniedit": Source("omniedit", formats.write_omniedit),
    "x2i2": Source("x2i2", more.write_x2i2),
    "bagel": Source("bagel", more.write_bagel),
    "energon": Source("energon", _write_energon),
    "hf-parquet": Source(
        "hf-parquet", more.write_any_parquet, {"source": "before", "target": "after", "instruction": "how"}
    ),
    "folder": Source("folder", _write_folder),
    "folder with a table": Source("folder", _write_csv),
    "tuxpaint-stamps": Source("tuxpaint-stamps", more.write_stamps),
    "openclipart": Source("openclipart", more.write_clip_art),
}


class Fuzz:
    """The intact sets, and what became of the cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.intact: dict[str, Imported] = {}
        for name, source in SOURCES.items():
            source.write(folder / "sets" / name)
            out = folder / "intact" / name
            self.intact[name] = Imported(source.importer, folder / "sets" / name, out, fields=source.fields)

    def try_case(self, name: str, seed: int) -> tuple[str, str]:
        """(what was changed, outcome) of one case: complete, with rejects, refused, or what went wrong."""
        rng = random.Random(f"{name} {seed}")
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / "sets" / name, work / name)
        path = rng.choice(sorted(path for path in (work / name).rglob("*") if path.is_file()))
        is_damage = rng.random() < 0.4
        what = f"{path.relative_to(work / name)}: "
        previous = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(TIMEOUT_S)
        try:
            what += (damage_bytes if is_damage else change_content)(path, rng)
            outcome = self._import(name, work, path, what)
            if outcome in ("complete", "with rejects"):
                _annotate_damaged(work / "out", rng)
        except Hang:
            outcome = f"wrong: hangs, {traceback.format_exc(limit=-3)}"
        except Exception:
            outcome = f"wrong: {traceback.format_exc(limit=-6)}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        return what, outcome

    def _import(self, name: str, work: Path, changed: Path, what: str) -> str:
        source, intact = SOURCES[name], self.intact[name]
        try:
            imported = Imported(source.importer, work / name, work / "out", samples=3, fields=source.fields)
        except (UserError, RunError) as error:
            return "refused" if "\n" not in str(error) else f"wrong: several lines: {error}"
        known, new = _by_row(intact), _by_row(imported)
        if len(new) != len(imported.records) and " twice" not in what and "twice at" not in what:
            return "wrong: two records of one item"
        for reject in imported.rejects:
            if not reject["reason"] or "\n" in reject["reason"]:
                return f"wrong: reject {reject}"
        for _, members in new.values():
            for image in image_members(members).values():
                load_resized(image, ImageConfig(side=32), 32)
        if ": value " in what or changed.suffix in (".png", ".jpg", ".txt"):
            other = [row for row, record in known.items() if new.get(row) != record]
            if len(other) > 1:
                return f"wrong: {len(other)} records differ: {other}"
        return "with rejects" if imported.rejects and imported.rejects != intact.rejects else "complete"


def _by_row(imported: Imported) -> dict[str, Row]:
    """Records and images by config and the source's name of the item."""
    rows = {}
    for record, members in zip(imported.records, imported.members, strict=True):
        origin = record["provenance"]
        rows[f"{origin['config']}/{origin['row']}"] = record, members
    return rows


def _annotate_damaged(folder: Path, rng: random.Random) -> None:
    """Run an operator on shards, then again after one byte of each tar has changed. Raises AssertionError."""
    choice = OperatorChoice(rng.choice(OPERATORS))
    for task in annotate_tasks([folder], choice):
        do_task(task, annotate_shard)
        before = _columns(task.outputs[0])
        tar = Path(task.arguments[1])
        data = bytearray(tar.read_bytes())
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        tar.write_bytes(data)
        counts = do_task(task, annotate_shard)
        after = _columns(task.outputs[0])
        assert counts.kept == len(after) and counts.read == counts.kept + counts.rejected
        assert all(before[key] == row for key, row in after.items()), f"{choice.name}: other values"
        assert len(before) - len(after) <= 1, f"{choice.name}: {len(before) - len(after)} records for one byte"


def _columns(path: Path) -> dict[str, str]:
    return {row["key"]: repr(row) for row in pq.read_table(path).to_pylist()}


def _hang(*arguments: Any) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=1e9, help="no further case is begun after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--only", default="", choices=["", *SOURCES])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    names = [arguments.only] if arguments.only else list(SOURCES)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for number in range(arguments.cases):
            if time.monotonic() > start + 60 * arguments.minutes:
                break
            name, seed = names[number % len(names)], arguments.seed + number // len(names)
            what, outcome = fuzz.try_case(name, seed)
            kind, _, problem = outcome.partition(": ")
            counts[name][kind] += 1
            if kind == "wrong":
                sys.stdout.write(f"{name}, seed {seed}: {what}\n{problem}\n")
                sys.stdout.flush()
    for name, of_name in counts.items():
        sys.stdout.write(f"{name:22} {sum(of_name.values()):6} {dict(sorted(of_name.items()))}\n")
    total = sum(counts.values(), Counter[str]())
    sys.stdout.write(
        f"{'all':22} {sum(total.values()):6} {dict(sorted(total.items()))} {time.monotonic() - start:.0f} s\n"
    )


if __name__ == "__main__":
    main()
