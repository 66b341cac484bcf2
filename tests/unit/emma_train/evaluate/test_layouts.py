"""Official files as items, and the official layouts."""

import json
from pathlib import Path

import pytest

from emma_train.errors import UserError
from emma_train.evaluate.layouts import BENCHMARKS, read_benchmark
from tests.benchmarks import dpg_data, geneval_data

OFFICIAL = Path(__file__).parents[5] / "shared" / "benchmarks"


def test_geneval_has_folders_of_five_digits_and_one_object_of_metadata(tmp_path: Path) -> None:
    benchmark, items = read_benchmark("geneval", geneval_data(tmp_path))
    assert list(benchmark.image_files(items[2])) == [f"00002/samples/0000{n}.png" for n in range(4)]
    [(path, content)] = benchmark.companions(items[2]).items()
    lines = (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()
    assert path == "00002/metadata.jsonl" and json.loads(content) == json.loads(lines[2])


def test_dpg_has_one_grid_a_prompt(tmp_path: Path) -> None:
    benchmark, items = read_benchmark("dpg", dpg_data(tmp_path))
    assert benchmark.image_files(items[2]) == {"whoops2.png": (0, 1, 2, 3)}
    assert items[2].prompt == "a red frog that counts to 2, on blue"


def test_seeds_depend_on_benchmark_item_and_sample_alone(tmp_path: Path) -> None:
    _, items = read_benchmark("geneval", geneval_data(tmp_path / "six", 6))
    _, more = read_benchmark("geneval", geneval_data(tmp_path / "nine", 9))
    seeds = [BENCHMARKS[name].seed(item, n) for name in ("geneval", "dpg") for item in items for n in range(4)]
    assert len(set(seeds)) == 2 * 6 * 4
    assert seeds[:24] == [BENCHMARKS["geneval"].seed(item, n) for item in more[:6] for n in range(4)]


@pytest.mark.parametrize("name", ["geneval", "dpg"])
def test_the_official_files_have_all_items(name: str) -> None:
    folder = OFFICIAL / {"geneval": "geneval", "dpg": "dpg_bench"}[name]
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the official prompts are not part of the repository")
    benchmark, items = read_benchmark(name, folder)
    assert len(items) == benchmark.num_items
    assert len({path for item in items for path in benchmark.image_files(item)}) == benchmark.num_items * (
        4 if name == "geneval" else 1
    )


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no evaluation_metadata.jsonl; name the folder"):
        read_benchmark("geneval", tmp_path)
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(UserError, match="line 2 is no JSON; download the file again"):
        read_benchmark("geneval", tmp_path)
    (tmp_path / "evaluation_metadata.jsonl").write_text('{"prompt": "a"}\n{"tag": 1}\n')
    with pytest.raises(UserError, match="entry 1 has no text 'prompt'"):
        read_benchmark("geneval", tmp_path)
    dpg_data(tmp_path / "dpg")
    (tmp_path / "dpg" / "prompts" / "a.b.txt").write_text("x")
    with pytest.raises(UserError, match="takes a name up to its first dot"):
        read_benchmark("dpg", tmp_path / "dpg")
