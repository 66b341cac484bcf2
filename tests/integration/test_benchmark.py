"""evaluate --benchmark: the bytes of a benchmark's images depend on neither ranks, nor kills, nor --limit."""

import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from emma_train.cli import main
from tests.benchmarks import dpg_data, files_of, gedit_data, geneval2_data, geneval_data, imgedit_data, wise_data
from tests.chat_server import chat_server
from tests.distributed.benchmark_ranks import killed_command
from tests.distributed.ranks import command
from tests.distributed.spawn import run_ranks, start_ranks
from tests.helpers import tiny_recipe, write_export

NUM_ITEMS = 7
DATA: dict[str, Callable[[Path, int], Path]] = {"geneval": geneval_data, "dpg": dpg_data}
MORE_DATA: dict[str, Callable[[Path, int], Path]] = {
    "gedit": gedit_data,
    "imgedit": imgedit_data,
    "wise": wise_data,
    "geneval2": geneval2_data,
}


def evaluate(model: Path, name: str, data: Path, out: Path, *options: str) -> list[str]:
    words = ["evaluate", str(model), "--benchmark", name, "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*words, "--steps", "2", "--batch", "8", *options]


def kill_ranks(size: int, argv: list[str], num_files: int) -> None:
    """Run on `size` ranks, each of which is killed while it writes its file number `num_files` + 1."""
    with tempfile.TemporaryDirectory() as folder:
        for rank in start_ranks(size, killed_command, argv, num_files, folder=Path(folder)):
            rank.join(240)
            assert rank.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "export"
    write_export(path, tiny_recipe("stage3", data__gen={"side": 64}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_killed_run_ends_with_the_bytes_of_a_straight_one(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, straight, killed = DATA[name](tmp_path / "data", NUM_ITEMS), tmp_path / "straight", tmp_path / "killed"
    assert main(evaluate(model, name, data, straight)) == 0
    argv = evaluate(model, name, data, killed)
    kill_ranks(2, argv, 2)
    kill_ranks(1, argv, 1)
    partial = files_of(killed / "images")
    assert len(partial) < len(files_of(straight / "images"))
    run_ranks(3, command, argv)
    assert files_of(killed / "images") == files_of(straight / "images")
    assert sorted(path.name for path in killed.iterdir()) == ["images", "settings.json", "sheet.png"]
    assert main([*argv, "--check"]) == 0
    assert f"the images of {NUM_ITEMS} items are complete" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_limit_changes_no_byte(name: str, model: Path, tmp_path: Path) -> None:
    data, straight, first = DATA[name](tmp_path / "data", NUM_ITEMS), tmp_path / "straight", tmp_path / "first"
    assert main(evaluate(model, name, data, straight)) == 0
    assert main(evaluate(model, name, data, first, "--limit", "3")) == 0
    assert main(evaluate(model, name, data, first, "--limit", "3", "--check")) == 0
    few = files_of(first / "images")
    assert (
        few.items() <= files_of(straight / "images").items() and len(few) == len(files_of(straight / "images")) * 3 / 7
    )
    assert main(evaluate(model, name, data, first)) == 0
    assert files_of(first / "images") == files_of(straight / "images")


def test_a_folder_goes_on_with_what_it_was_begun_with_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = geneval_data(tmp_path / "data", 2), tmp_path / "out"
    argv = evaluate(model, "geneval", data, out)
    assert main(argv) == 0
    before = files_of(out / "images")
    other = tmp_path / "other"
    write_export(other, tiny_recipe("stage3", data__gen={"side": 64}), seed=1)
    changes = {
        "generation.steps was 2": [*argv, "--steps", "3"],
        "batch was 8": [*argv, "--batch", "4"],
        "size": [*argv, "--size", "96", "64"],
        "checkpoint.digest was": evaluate(other, "geneval", data, out),
        "prompts was": evaluate(model, "geneval", geneval_data(tmp_path / "more", 3), out),
        "benchmark was": evaluate(model, "dpg", dpg_data(tmp_path / "dpg", 2), out),
        "ema was true": [*argv, "--no-ema"],
    }
    for words, changed in changes.items():
        capsys.readouterr()
        assert main(changed) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error and "name another folder with --out" in error
    assert main([*changes["prompts was"], "--check"]) == 2
    assert files_of(out / "images") == before


@pytest.mark.seconds
@pytest.mark.parametrize("name", MORE_DATA)
def test_every_benchmark_is_written_and_complete(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edits have the size of their source, whatever the model's; a lost image comes back as it was."""
    data, out = MORE_DATA[name](tmp_path / "data", 3), tmp_path / "out"
    argv = evaluate(model, name, data, out)
    assert main(argv) == 0
    assert main([*argv, "--check"]) == 0, capsys.readouterr().out
    before = files_of(out)
    images = sorted(path for path in out.rglob("*.png") if path.name not in ("sheet.png",))
    sizes = {Image.open(path).size for path in images}
    assert sizes == {"gedit": {(60, 40)}, "imgedit": {(60, 40), (60, 70)}}.get(name, {(64, 64)})
    images[1].unlink()
    assert main([*argv, "--check"]) == 1
    assert main(argv) == 0
    assert files_of(out) == before


def test_scores_name_their_checkpoint_and_settings(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = geneval_data(tmp_path / "data", 2), tmp_path / "out"
    argv = evaluate(model, "geneval", data, out)
    assert main([*argv, "--score", str(tmp_path)]) == 2
    assert "has no settings.json; name a folder that" in capsys.readouterr().err
    assert main(argv) == 0
    lines = [{"filename": str(path), "correct": path.parent.parent.name == "00001"} for path in out.rglob("0*.png")]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    assert main([*argv, "--score", str(results)]) == 0
    written = json.loads((out / "results.json").read_text())
    settings = json.loads((out / "settings.json").read_text())
    assert written["config"]["checkpoint"] == settings["fixed"]["checkpoint"]
    assert written["config"]["generation"]["steps"] == 2 and len(written["failures"]) == 1
    assert written["results"]["geneval_overall"]["accuracy,none"] in (0.5, 3 / 8)
    assert "| geneval | overall: accuracy | 0." in (out / "results").with_suffix(".md").read_text()
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert main([*argv, "--check"]) == 0


def test_scores_go_into_the_card_of_the_export_that_was_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, other = tmp_path / "export", tmp_path / "other"
    write_export(export, tiny_recipe("stage3", data__gen={"side": 64}))
    write_export(other, tiny_recipe("stage3", data__gen={"side": 64}), seed=1)
    data, out = geneval_data(tmp_path / "data", 2), tmp_path / "out"
    argv = evaluate(export, "geneval", data, out)
    assert main(argv) == 0
    lines = [{"filename": str(path), "correct": True} for path in out.rglob("0*.png")]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = ["--score", str(results), "--card"]
    assert main([*argv, *scored]) == 0
    assert "| geneval | overall: accuracy | 1.0 |" in (export / "README.md").read_text()
    assert main([*evaluate(other, "geneval", data, out), *scored]) == 2
    assert f"{other}: is not the checkpoint that was scored" in capsys.readouterr().err
    assert not (other / "README.md").exists()
    assert main([*argv, "--card"]) == 2
    assert "images have no scores yet" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--card"]) == 2
    assert "is not an export; make one with: emma-train export" in capsys.readouterr().err


def test_rewritten_prompts_change_the_images_and_no_metadata(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file, and from a chat model, which is asked once for every prompt."""
    data, plain, asked, read = (
        geneval_data(tmp_path / "data", 2),
        tmp_path / "plain",
        tmp_path / "asked",
        tmp_path / "read",
    )
    assert main(evaluate(model, "geneval", data, plain)) == 0
    with chat_server(lambda question: json.dumps({"prompt": f"{question.text} on the moon"})) as server:
        argv = [*evaluate(model, "geneval", data, asked), "--rewrite", server.url, "--rewrite-model", "writer"]
        assert main(argv) == 0 and main(argv) == 0
        assert len(server.questions) == 2
    lines = tmp_path / "lines.txt"
    lines.write_text("1 cows on the moon\n2 cows on the moon\n")
    assert main([*evaluate(model, "geneval", data, read), "--rewrite", str(lines)]) == 0
    assert files_of(asked / "images") == files_of(read / "images")
    changed = {
        name for name, content in files_of(read / "images").items() if content != files_of(plain / "images")[name]
    }
    assert changed == {name for name in files_of(plain / "images") if name.endswith(".png")}
    settings = json.loads((asked / "settings.json").read_text())["fixed"]
    assert settings["rewrite"]["by"] == ["writer"] and settings["prompts"]
    assert main([*evaluate(model, "geneval", data, read), "--check"]) == 0
    assert main(evaluate(model, "geneval", data, read)) == 2
    assert "rewrite was" in capsys.readouterr().err
