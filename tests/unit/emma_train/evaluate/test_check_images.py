"""What --check notices: every planted fault of a complete folder, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_train.evaluate.check_images import ImageCheck
from emma_train.evaluate.image_folder import ImageFolder, grid_of, png
from emma_train.evaluate.layouts import read_benchmark
from emma_train.evaluate.overview import write_overview
from emma_train.evaluate.writer import file_sizes_of
from tests.benchmarks import dpg_data, gedit_data, geneval2_data, geneval_data

SIDE = 16


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Written:
    """A complete folder of a small benchmark."""

    def __init__(self, name: str, data: Path, out: Path) -> None:
        self.benchmark, self.items = read_benchmark(name, data)
        self.folder = ImageFolder(out)
        self.folder.prepare()
        self.images = self.folder.images
        for item, size in zip(self.items, file_sizes_of(self.benchmark, self.items, (SIDE, SIDE)), strict=True):
            for path, content in self.benchmark.companions(item).items():
                self.folder.write(path, content)
            for number, path in enumerate(self.benchmark.image_files(item)):
                self.folder.write(path, png(noise(*size, seed=5000 + 10 * item.number + number)))
        self.folder.clean()
        write_overview(self.benchmark, self.folder, self.items, [item.prompt for item in self.items])

    def problems(self, limit: int | None = None) -> list[str]:
        checked = ImageCheck(self.benchmark, self.folder, (SIDE, SIDE))
        return [f"{p.kind}: {p.path}" for p in checked.problems(self.items[:limit])]


@pytest.fixture
def geneval(tmp_path: Path) -> Written:
    return Written("geneval", geneval_data(tmp_path / "data"), tmp_path / "out")


@pytest.fixture
def dpg(tmp_path: Path) -> Written:
    return Written("dpg", dpg_data(tmp_path / "data"), tmp_path / "out")


IMAGE = "00003/samples/00001.png"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def store(array: np.ndarray, **options: str) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(array).save(path, **options)


GENEVAL_FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    f"missing: {IMAGE}": (IMAGE, Path.unlink),
    "missing: 00003/metadata.jsonl": ("00003/metadata.jsonl", Path.unlink),
    "wrong content: 00003/metadata.jsonl": (
        "00003/metadata.jsonl",
        lambda path: path.write_bytes((path.parents[1] / "00002/metadata.jsonl").read_bytes()),
    ),
    "wrong content: 00004/metadata.jsonl": (
        "00004/metadata.jsonl",
        lambda path: path.write_bytes(2 * path.read_bytes()),
    ),
    "extra: 00003/samples/00004.png": ("00003/samples/00004.png", store(noise(SIDE, SIDE, 999))),
    "extra: 00003/samples/00000.png.tmp": ("00003/samples/00000.png.tmp", lambda path: path.write_bytes(b"")),
    "extra: 00006": ("00006", Path.mkdir),
    f"unreadable: {IMAGE}": (IMAGE, truncate),
    "unreadable: 00002/samples/00000.png": ("00002/samples/00000.png", lambda path: path.write_bytes(b"")),
    "blank: 00003/samples/00001.png": (IMAGE, store(np.full((SIDE, SIDE, 3), 127, np.uint8))),
    f"wrong size: {IMAGE}": (IMAGE, store(noise(SIDE, SIDE + 1, 999))),
    f"wrong format: {IMAGE}": (IMAGE, store(noise(SIDE, SIDE, 999), format="JPEG")),
    "wrong format: 00000/samples/00001.png": ("00000/samples/00001.png", store(noise(SIDE, SIDE, 999)[:, :, 0])),
    f"equal images: {IMAGE}": (IMAGE, lambda path: path.write_bytes((path.parent / "00000.png").read_bytes())),
}


@pytest.mark.parametrize("fault", GENEVAL_FAULTS)
def test_a_fault_of_geneval_is_noticed(fault: str, geneval: Written) -> None:
    assert geneval.problems() == []
    path, plant = GENEVAL_FAULTS[fault]
    plant(geneval.images / path)
    assert geneval.problems() == [fault]


def cells(*seeds: int, side: int = SIDE) -> np.ndarray:
    return grid_of([noise(side, side, seed) for seed in seeds])


DPG_FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "equal images: whoops2.png cell 3": ("whoops2.png", store(cells(1001, 1002, 1003, 1001))),
    "wrong size: whoops2.png": ("whoops2.png", store(np.pad(cells(1001, 1002, 1003, 1004), ((2, 2), (2, 2), (0, 0))))),
    "wrong size: whoops3.png": ("whoops3.png", store(noise(SIDE, SIDE, 999))),
    "missing: whoops2.png": ("whoops2.png", Path.unlink),
    "extra: dpg-bench_results.txt": ("dpg-bench_results.txt", lambda path: path.write_text("")),
}


@pytest.mark.parametrize("fault", DPG_FAULTS)
def test_a_fault_of_dpg_is_noticed(fault: str, dpg: Written) -> None:
    assert dpg.problems() == []
    path, plant = DPG_FAULTS[fault]
    plant(dpg.images / path)
    assert dpg.problems() == [fault]


def test_the_first_items_are_expected_where_there_is_a_limit(dpg: Written) -> None:
    assert dpg.problems(4) == ["extra: whoops4.png", "extra: whoops5.png"]
    (dpg.images / "whoops4.png").unlink()
    (dpg.images / "whoops5.png").unlink()
    assert dpg.problems(4) == []


def test_a_blank_cell_of_a_grid_is_noticed(dpg: Written) -> None:
    grid = cells(1001, 1002, 1003, 1004)
    grid[:SIDE, :SIDE] = 0
    store(grid)(dpg.images / "whoops2.png")
    assert dpg.problems() == ["blank: whoops2.png cell 0"]


EDIT = "emma/fullset/subject-add/cn/cnkey1.png"
SOURCE = EDIT.replace(".png", "_SRCIMG.png")
GEDIT_FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    f"equal to its source: {EDIT}": (
        EDIT,
        lambda path: path.write_bytes((path.parent / "cnkey1_SRCIMG.png").read_bytes()),
    ),
    f"wrong content: {SOURCE}": (SOURCE, store(noise(40, 60, 999))),
    f"missing: {SOURCE}": (SOURCE, Path.unlink),
    f"wrong size: {EDIT}": (EDIT, store(noise(60, 90, 999))),
}


@pytest.mark.parametrize("fault", GEDIT_FAULTS)
def test_a_fault_of_gedit_is_noticed(fault: str, tmp_path: Path) -> None:
    gedit = Written("gedit", gedit_data(tmp_path / "data"), tmp_path / "out")
    scores = gedit.images / "emma" / "gpt4o" / "eval_results_new" / "emma_subject-add_gpt_score.csv"
    scores.parent.mkdir(parents=True)
    scores.write_text("what the scorer writes is nothing extra")
    assert gedit.problems() == []
    path, plant = GEDIT_FAULTS[fault]
    plant(gedit.images / path)
    assert gedit.problems() == [fault]


def test_an_index_that_was_moved_is_noticed(tmp_path: Path) -> None:
    geneval2 = Written("geneval2", geneval2_data(tmp_path / "data"), tmp_path / "out")
    assert geneval2.problems() == []
    geneval2.folder.out.rename(tmp_path / "moved")
    geneval2.folder = ImageFolder(tmp_path / "moved")
    assert geneval2.problems() == ["wrong content: geneval2_images.json"]
