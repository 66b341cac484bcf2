"""Statistics come from the index alone; for a small folder they are known in advance."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipelines.shards.stats import aspect_shares, details, folder_stats, histogram, overview
from tests.helpers import tokenizer
from tests.shards import edit, prompt, question, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = [question(f"q{i:03d}", ["a cat", "two cats"], tags=["stem"] if i < 3 else [], side=64) for i in range(5)]
    contents += [prompt(f"p{i:03d}", side=32) for i in range(4)] + [edit("e000")]
    folder = write_shards(tmp_path, contents, per_shard=4)
    for tar in folder.glob("*.tar"):  # only its size is looked at
        tar.write_bytes(bytes(tar.stat().st_size))
    return folder


def test_numbers_of_a_folder(folder: Path) -> None:
    stats = folder_stats(folder)
    assert (stats.records, stats.stem) == (10, 3)
    i2t, t2i, it2i = (stats.tasks[task] for task in ("i2t", "t2i", "it2i"))
    assert (i2t.samples, i2t.alternatives, i2t.images) == (5, 10, 10)
    assert (t2i.samples, t2i.alternatives, t2i.images) == (4, 4, 4)
    assert (it2i.samples, it2i.alternatives, it2i.images) == (1, 2, 4)
    answers = [len(tokenizer().encode(text)) + 1 for text in ("a cat", "two cats")]
    assert sorted(i2t.supervised_tokens) == sorted(answers * 5)
    assert i2t.tags == {"stem": 3}
    assert sorted(stats.widths) == [32] * 6 + [64] * 5
    assert sum(shard["bytes"] for shard in stats.manifest["shards"]) == sum(
        t.stat().st_size for t in folder.glob("*.tar")
    )


def test_the_tables_say_it(folder: Path) -> None:
    stats = folder_stats(folder)
    console = Console(width=100, record=True, file=io.StringIO())
    for table in (overview("here", {"set": stats}), *details(stats)):
        console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["set", "3"] in [line[:2] for line in lines]
    i2t = next(line for line in lines if line[:1] == ["i2t"])
    longest = str(int(stats.tasks["i2t"].text_tokens.max()))
    assert i2t[5] == longest
    assert i2t[7:9] == ["2.00", "1.00"]
    assert ["stem", "3", "0", "0"] in lines
    assert ["width", "32", "32", "64", "64", "64"] in [line[:6] for line in lines]


def test_a_folder_of_text_alone_has_no_table_of_images(tmp_path: Path) -> None:
    turns = [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello"}]
    folder = write_shards(tmp_path, [("t0", {"i2t": [{"turns": turns}]}, {})])
    assert len(details(folder_stats(folder))) == 1


def test_bands_and_bars() -> None:
    shares = aspect_shares(np.array([100, 100, 400, 50, 10]), np.array([100, 110, 100, 100, 100]))
    assert shares["1:1"] == 0.4
    assert shares["4:1 +"] == shares["1:2"] == shares["1:4 +"] == 0.2
    assert sum(shares.values()) == pytest.approx(1.0)
    assert histogram(np.array([0, 0, 0, 0, 10, 20]), bins=4) == "█ ▂▂"
