"""Official files as items, and the official layouts."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from emma_train.errors import UserError
from emma_train.evaluate.image_folder import ImageFolder
from emma_train.evaluate.layouts import BENCHMARKS, read_benchmark
from emma_train.evaluate.settings_file import prompts_digest
from emma_train.evaluate.writer import source_size_of
from tests.benchmarks import dpg_data, gedit_data, geneval2_data, geneval_data, imgedit_data, wise_data

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


def test_gedit_has_an_edit_and_its_source_by_task_and_language(tmp_path: Path) -> None:
    benchmark, items = read_benchmark("gedit", gedit_data(tmp_path, 4))
    assert len(items) == 8 and items[3].name == "subject-add/cn/cnkey1" and items[3].prompt == "把背景换成 1"
    assert list(benchmark.image_files(items[3])) == ["emma/fullset/subject-add/cn/cnkey1.png"]
    assert items[3].source and items[3].source.size() == (60, 90)
    assert items[7].reference and items[7].reference.size() == (40, 60)
    [(path, content)] = benchmark.companions(items[7]).items()
    assert path == "emma/fullset/background_change/cn/cnkey3_SRCIMG.png"
    source = np.asarray(Image.open(BytesIO(items[7].reference.read())))
    assert np.array_equal(np.asarray(Image.open(BytesIO(content))), source)
    _, cn = read_benchmark("gedit", tmp_path, "cn")
    assert [item.name for item in cn] == [item.name for item in items if "/cn/" in item.name]
    with pytest.raises(UserError, match="geneval has no such language"):
        read_benchmark("geneval", tmp_path, "cn")


def test_imgedit_has_an_edit_of_its_source_by_key(tmp_path: Path) -> None:
    benchmark, items = read_benchmark("imgedit", imgedit_data(tmp_path))
    assert [item.name for item in items[:2]] == ["1000", "999"]
    assert benchmark.image_files(items[1]) == {"999.png": (0,)}
    assert items[1].source == items[1].reference and items[1].source and items[1].source.size() == (70, 60)
    entries = json.loads((tmp_path / "basic_edit.json").read_text())
    entries["999"]["id"] = "../../secret.jpg"
    (tmp_path / "basic_edit.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="outside of the sources"):
        read_benchmark("imgedit", tmp_path)


@pytest.mark.parametrize("suffix", ["", "_verified"])
def test_wise_has_an_image_by_the_id_of_its_prompt(suffix: str, tmp_path: Path) -> None:
    benchmark, items = read_benchmark("wise", wise_data(tmp_path, 2, suffix))
    assert [path for item in items for path in benchmark.image_files(item)] == [f"{n}.png" for n in range(1, 7)]
    assert items[4].prompt == "natural_science 1" and items[4].metadata["Explanation"] == "why"


def test_geneval2_has_an_index_of_prompts(tmp_path: Path) -> None:
    benchmark, items = read_benchmark("geneval2", geneval2_data(tmp_path))
    index = ImageFolder(tmp_path / "out").index(benchmark, items)
    assert index["3 frogs"] == str(tmp_path / "out" / "images" / "00003.png") and len(index) == 6


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


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _, items = read_benchmark("imgedit", imgedit_data(tmp_path / "imgedit"))
    assert items[0].source
    items[0].source.path.write_bytes(b"no image")
    with pytest.raises(UserError, match="000.jpg: the image cannot be read .*; download it again"):
        source_size_of(items[0].source)
    items[0].source.path.unlink()
    with pytest.raises(UserError, match="000.jpg: the image cannot be read"):
        prompts_digest(items)
    table = gedit_data(tmp_path / "gedit", 1) / "data" / "train.parquet"
    rows = pyarrow.parquet.read_table(table).to_pylist()
    pyarrow.parquet.write_table(pa.Table.from_pylist([rows[0], {**rows[1], "input_image": None}]), table)
    benchmark, items = read_benchmark("gedit", tmp_path / "gedit")
    with pytest.raises(UserError, match=r"train.parquet \(row 1\): the image cannot be read"):
        benchmark.companions(items[1])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(table).drop_columns(["input_image"]), table)
    with pytest.raises(UserError, match="has no column input_image; it is no table of GEdit-Bench"):
        read_benchmark("gedit", tmp_path / "gedit")
