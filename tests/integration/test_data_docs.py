"""The commands of docs/data.md, as they are written, on small sets in the folders that they name."""

import shlex
from pathlib import Path

import pytest

from data_pipelines.cli import main
from data_pipelines.shards.index import read_manifest
from tests import more_public_formats
from tests import public_formats as formats
from tests.helpers import ASSETS, ROOT

pytest.importorskip("duckdb")
SMALLER = {"min_side >= 512": "min_side >= 32", "--side 512": "--side 64", "relevance_min >= 4": "relevance_min >= 1"}
"""What is too much for the small sets."""
NUM_COMMANDS = 14


def commands() -> list[list[str]]:
    """From the folders as they are downloaded to latents, in the order of the page."""
    text = (ROOT / "docs" / "data.md").read_text()
    start = text.index("From the folders as they are downloaded")
    block = text[start : text.index("`tests/integration/test_data_docs.py` runs", start)]
    for usual, smaller in SMALLER.items():
        block = block.replace(usual, smaller)
    return [shlex.split(line) for line in block.splitlines() if line.startswith("    emma-data ")]


@pytest.mark.slow
def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    formats.write_llava_pretrain(Path("LLaVA-Pretrain"), 6)
    formats.write_img2dataset(Path("laion"), 8)
    for config in ("ai2d(gpt4v)", "geo170k(align)"):
        formats.write_onevision(Path("LLaVA-OneVision-Data"), config, 4)
    formats.write_finevision(Path("FineVision"), "ai2d_merged", num=4)
    formats.write_omniedit(Path("OmniEdit"), 6)
    more_public_formats.write_x2i2(Path("X2I2"))
    Path("models").mkdir()
    Path("models/Qwen3-4B").symlink_to(ASSETS / "tokenizer")
    Path("models/dc-ae").symlink_to(ASSETS / "autoencoder")
    words = commands()
    assert len(words) == NUM_COMMANDS
    for command, *arguments in words:
        assert command == "emma-data"
        one_worker = ["--workers", "1"] if arguments[0] in ("import", "annotate") else []  # starting Ray takes seconds
        assert main([*arguments, *one_worker]) == 0, arguments
    folders = sorted(path.parent for path in Path("data").rglob("manifest.json"))
    samples = {str(folder.relative_to("data")): read_manifest(folder)["samples"] for folder in folders}
    tasks = {name: {task for task, number in of_set.items() if number} for name, of_set in samples.items()}
    assert tasks == {
        "stage0/llava-558k": {"i2t"},
        "import/laion": {"i2t", "t2i"},
        "import/onevision": {"i2t"},
        "import/finevision": {"i2t"},
        "import/omniedit": {"it2i"},
        "import/x2i2": {"t2i", "it2i"},
        "import/geo170k": {"i2t"},
        "t2i": {"t2i"},
        "i2t": {"i2t"},
        "edit": {"it2i"},
    }
