"""Near-duplicates: clusters against a comparison of all pairs, and the columns of copies."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.cli import main
from data_pipelines.prepare.annotate import column_file
from data_pipelines.prepare.duplicates import hash_clusters
from data_pipelines.prepare.select_rows import EngineLimits
from tests.shards import write_shards
from tests.unit.data_pipelines.prepare.test_operators import drawing, encoded

pytest.importorskip("duckdb")
LIMITS = EngineLimits(1, 1)


@pytest.mark.parametrize("max_bits", [0, 3, 6])
def test_clusters_are_those_of_all_pairs(max_bits: int) -> None:
    rng = np.random.default_rng(max_bits)
    values = [int(value) for value in rng.integers(0, 2**63, 40)]
    values += [
        value ^ int(sum(1 << int(bit) for bit in rng.choice(64, rng.integers(1, 9), replace=False))) for value in values
    ]
    rows = [(f"{value:016x}", f"k{number:03d}", 1 + number % 2) for number, value in enumerate(dict.fromkeys(values))]
    linked = {text: {text} for text, _, _ in rows}
    for _ in range(8):  # closure of the relation, by brute force
        for one in linked:
            linked[one] |= {b for a in linked[one] for b in linked if (int(a, 16) ^ int(b, 16)).bit_count() <= max_bits}
    numbers = {text: (key, number) for text, key, number in rows}
    expected = {
        text: (min(numbers[other][0] for other in group), sum(numbers[other][1] for other in group))
        for text, group in linked.items()
    }
    assert hash_clusters(rows, max_bits, LIMITS) == expected


@pytest.mark.seconds
def test_copies_at_another_size_are_duplicates_of_the_smallest_key(tmp_path: Path) -> None:
    images = {f"k{n}": drawing(n) for n in range(6)}
    images |= {"z1": images["k1"].resize((128, 128)), "z2": images["k1"].resize((200, 200)), "z3": images["k4"]}
    contents = [
        (key, {"t2i": [{"target": "img0", "text": "a drawing"}]}, {"img0.png": encoded(image, format="PNG")})
        for key, image in images.items()
    ]
    folder = write_shards(tmp_path / "set", contents, per_shard=4)
    assert main(["annotate", "phash", str(folder), "--workers", "1"]) == 0
    assert main(["annotate", "duplicates", str(folder), "--workers", "1", "--set", "max_bits=4"]) == 0
    rows = [
        row for tar in sorted(folder.glob("*.tar")) for row in pq.read_table(column_file(tar, "duplicates")).to_pylist()
    ]
    assert {row["key"]: row["duplicate_of"] for row in rows if row["duplicate_of"]} == {
        "z1": "k1",
        "z2": "k1",
        "z3": "k4",
    }
    assert {row["key"]: row["cluster_size"] for row in rows if row["cluster_size"] > 1} == {
        "k1": 3, "z1": 3, "z2": 3, "k4": 2, "z3": 2,
    }  # fmt: skip
