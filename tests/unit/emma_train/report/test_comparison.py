"""Comparison of runs: lines in closed form, differences of configs, and a page that is whole."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_train.cli import main
from emma_train.errors import UserError
from emma_train.report.comparison import NUM_POINTS, config_differences, loss_charts_of, read_compared, write_comparison


def write_run(folder: Path, steps: int, every: int, slope: float, config: str = "", image: bool = False) -> Path:
    """A run whose loss is 10 - slope * step, with 100 tokens and 2 s a step, logged at step 1 and at multiples."""
    folder.mkdir(parents=True)
    logged = sorted({1, *range(every, steps + 1, every)})
    rows = [
        {"step": n, "loss": 10 - slope * n, "tokens/total": 100, "step_s": 2.0, "tokens_per_s": 50.0} for n in logged
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"run: {{name: {folder.name}}}\n{config}")
    if image:
        samples = folder / "samples" / f"step-{steps:08d}"
        samples.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(samples / "t2i-0.png")
        listed = [{"task": "t2i", "prompt": "a red square", "file": "t2i-0.png"}]
        (samples / "samples.json").write_text(json.dumps(listed))
    return folder


def test_runs_that_log_at_other_steps_share_an_axis(tmp_path: Path) -> None:
    runs = [read_compared(write_run(tmp_path / name, steps, every, 0.01)) for name, steps, every in
            (("a", 400, 10), ("b", 200, 7))]  # fmt: skip
    charts = {chart.key: chart for chart in loss_charts_of(runs)}
    assert set(charts) == {"steps", "tokens", "hours"}
    first, second = charts["steps"].hover
    x = np.linspace(0, 400, NUM_POINTS)
    inside = x >= 1
    assert np.array(first["y"])[inside] == pytest.approx((10 - 0.01 * x)[inside], abs=2e-3)
    ends = [value is not None for value in second["y"]]
    assert ends == [bool(1 <= position <= 196) for position in x]  # nothing is drawn beyond the last record
    assert "cursor" not in charts["tokens"].html
    assert runs[0].accumulated("tokens/total")[-1] == 400 * 100
    assert runs[1].accumulated("step_s")[-1] == 196 * 2.0


def test_stages_of_a_pipeline_follow_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "p" / "stage0", 20, 10, 0.1)
    write_run(tmp_path / "p" / "stage1", 40, 10, 0.1)
    run = read_compared(tmp_path / "p")
    assert run.steps().tolist() == [1, 10, 20, 21, 30, 40, 50, 60]


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", 10, 5, 0.1, "optimizer: {lr: 0.1, betas: [0.9, 0.95]}\nmix: {i2t: 1}\n")
    two = write_run(tmp_path / "b", 10, 5, 0.1, "optimizer: {lr: 0.2, betas: [0.9, 0.95]}\nmix: {i2t: 1, t2i: 2}\n")
    assert config_differences([read_compared(one), read_compared(two)]) == {
        "mix.t2i": ["–", "2"],
        "optimizer.lr": ["0.1", "0.2"],
    }


def test_the_page_loads_nothing_and_shows_the_last_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, 20, 5, 0.1, image=True) for name in ("a", "b")]
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert page.count("data:image/webp;base64,") == 2
    assert page.count("a red square") >= 1
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert all(str(run) in page for run in runs)


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", 10, 5, 0.1)
    assert main(["report", str(run), str(tmp_path / "none")]) == 2
    assert "holds no run with metrics" in capsys.readouterr().err
    with pytest.raises(UserError, match="7 runs are too many"):
        write_comparison([run] * 7, tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*: cannot be written"):
        write_comparison([run, run], tmp_path / "file" / "page.html")
