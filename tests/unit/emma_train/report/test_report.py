"""The report page of made-up runs: complete, self-contained, and open about what is missing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emma_train.errors import UserError
from emma_train.report.report import render_report, write_report
from emma_train.report.stage_run import StageRun, stage_folders

STAGES = (
    "stage0",
    "stage1",
    "stage2_phase1",
    "stage2_phase2",
    "stage2_phase3",
    "stage3",
    "stage4_expert",
    "stage4_router",
)
LABELS = (
    "Stage 0",
    "Stage 1",
    "Stage 2 · phase1",
    "Stage 2 · phase3",
    "Stage 3",
    "Stage 4 · expert",
    "Stage 4 · router",
)
VOID = {"meta", "img", "input", "br", "hr", "link"}


class Balance(HTMLParser):
    """Collects tags that are not balanced, and every attribute that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.images_without_alt = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.scripts += tag == "script"
        self.images_without_alt += tag == "img" and not dict(attrs).get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def check(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.wrong == [] and parser.open == []
    assert all(load.startswith("data:image/") for load in parser.loads)
    assert "@import" not in html and "url(" not in html
    assert parser.scripts == 2, "a prompt or a config made its way into the page as script"
    assert parser.images_without_alt == 0
    return parser


def page_data(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert match
    data: dict[str, Any] = json.loads(match[1])
    return data


def make_stage(folder: Path, steps: int = 30, **changes: Any) -> None:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "stage": folder.name,
                "loss": 3 * math.exp(-step / 10),
                "loss/t2i": 2 * math.exp(-step / 10),
                "lr": 1e-4,
                "grad_norm": 1.0,
                "tokens/total": 1000,
                "tokens_per_s": 5000.0,
                "step_s": 0.2,
                "data/wait_s": 0.02,
                "checkpoint/stall_s": 0.0,
                "data/straggler": 1.1,
                "time_unix": 1.7e9 + step,
            }
            file.write(json.dumps(record | changes) + "\n")
    (folder / "config.yaml").write_text(f"stage:\n  name: {folder.name}  # see https://example.org <b>\n")
    (folder / "environment.json").write_text(
        json.dumps({"commit": "abc123abc123", "device": "Some card", "world_size": 3, "versions": {"torch": "2.13"}})
    )
    summary = {
        "stage": folder.name,
        "steps": steps,
        "seconds": 6.0,
        "trainable": {"gen_adapter": 1234},
        "frozen_verified": True,
        "parameters": 5_000_000,
        "trainable_parameters": 1234,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def make_samples(folder: Path, step: int) -> None:
    step_folder = folder / "samples" / f"step-{step:08d}"
    step_folder.mkdir(parents=True)
    pixels = np.random.default_rng(step).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    for name in ("t2i-0.png", "it2i-0.png", "it2i-0.reference.png", "it2i-0.target.png", "i2t-0.png"):
        Image.fromarray(pixels).save(step_folder / name)
    samples = [
        {"file": "t2i-0.png", "task": "t2i", "prompt": '<script>alert("x")</script> & a "dog"'},
        {"file": "gone.png", "task": "t2i", "prompt": "an image that is gone"},
        {"file": "../../config.yaml", "task": "t2i", "prompt": "a file elsewhere"},
        {
            "file": "it2i-0.png",
            "task": "it2i",
            "prompt": "add <b>",
            "reference": "it2i-0.reference.png",
            "target": "it2i-0.target.png",
        },
        {"reference": "i2t-0.png", "task": "i2t", "prompt": "Which group?", "answer": "Food.", "truth": "food"},
        {"reference": "i2t-0.png", "task": "i2t", "prompt": "Which style?", "answer": "<i>flat", "truth": "modern"},
    ]
    (step_folder / "samples.json").write_text(json.dumps(samples))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    for name in reversed(STAGES):
        make_stage(run / name)
    make_samples(run / "stage1", 10)
    make_samples(run / "stage3", 30)
    scores = [
        {"name": "group <x>", "split": "heldout_drawings", "value": 0.83, "bar": 0.6, "baseline": 0.1, "unit": "exact"},
        {"name": "velocity", "split": "heldout_drawings", "value": 0.7, "bar": 0.6, "higher_is_better": False},
    ]
    (run / "scores.json").write_text(json.dumps({"scores": scores}))
    return run


def test_a_pipelines_page_is_complete_and_loads_nothing(pipeline: Path) -> None:
    path = write_report(pipeline)
    assert path == pipeline / "report.html"
    html = path.read_text(encoding="utf-8")
    check(html)
    positions = [html.index(f"<h3>{label}</h3>") for label in LABELS]
    assert positions == sorted(positions)
    for word in (
        "240 steps",
        "1 of 2</b> scores",
        "<dd>abc123abc123</dd>",
        "<dd>Some card</dd>",
        "<dd>3</dd>",
        "frozen parts unchanged",
        "gen adapter",
        "Where the time went",
    ):
        assert word in html, word
    assert [p.name for p in pipeline.glob("report*")] == ["report.html"]


def test_texts_are_escaped_and_answers_marked(pipeline: Path) -> None:
    html = render_report(pipeline)
    assert "<script>alert" not in html and "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in html
    assert "add &lt;b&gt;" in html and "group &lt;x&gt;" in html and "&lt;i&gt;flat" in html
    assert html.count('aria-label="right"') == 1 and html.count('aria-label="wrong"') == 1
    assert "no image" in html


def test_images_are_small(pipeline: Path) -> None:
    import base64
    import io

    sources = [load for load in check(render_report(pipeline)).loads if load.startswith("data:image/webp")]
    assert sources
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
            assert max(image.size) <= 192


def test_the_x_axis_runs_through_all_stages(pipeline: Path) -> None:
    data = page_data(render_report(pipeline))
    assert data["end"] == 8 * 30
    assert data["x"] == list(range(1, 241)) and data["step"][:31] == [*range(1, 31), 1]
    assert {"loss", "tasks", "lr", "grad", "speed", "time", "straggler"} <= set(data["charts"])


def test_the_share_of_the_stem_expert_is_drawn_where_there_is_one(pipeline: Path) -> None:
    assert "stem" not in page_data(render_report(pipeline))["charts"]
    make_stage(pipeline / "stage4_extra", steps=3, **{"vision/stem_share": 0.25})
    (share,) = page_data(render_report(pipeline))["charts"]["stem"]
    assert [y for y in share["y"] if y is not None] == [25.0] * 3


def test_losses_by_source_are_drawn_where_a_task_has_several(tmp_path: Path) -> None:
    values = {"loss/i2t/captions": 2.0, "loss/i2t/questions": 1.0, "loss/t2i/drawings": 0.5}
    make_stage(tmp_path / "run", steps=3, **values)
    charts = page_data(render_report(tmp_path / "run"))["charts"]
    captions, questions = charts["sources-i2t"]
    assert (captions["name"], questions["name"]) == ("captions", "questions")
    assert [y for y in captions["y"] if y is not None] == [2.0] * 3
    assert "sources-t2i" not in charts


def test_a_single_run_has_a_page(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    check(html)
    assert "<b>30 steps</b> in <b>0:06</b>" in html
    assert "no sample images" in html and "no scores" in html


def test_non_finite_losses_are_reported(tmp_path: Path) -> None:
    make_stage(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": null}\n{"step": 32, "loss": NaN}\n{"step": 33, "loss": 0}\n{"step": 34, "lo')
    html = render_report(tmp_path / "run")
    check(html)
    assert "not finite at run step 31, run step 32." in html
    page_data(html)


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    make_stage(tmp_path / "run", steps=3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 77.0}\n')
    data = page_data(render_report(tmp_path / "run"))
    assert data["x"] == [1, 2, 3] and data["charts"]["loss"][0]["y"][1] == 77.0


@pytest.mark.parametrize(
    "make",
    [
        lambda run: (run / "metrics.jsonl").write_text(""),
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'),
        lambda run: (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n'),
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": "oops", "lr": true}\nnonsense'),
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe<script>"),
        lambda run: [(run / n).write_text("[]") for n in ("summary.json", "environment.json", "scores.json")],
        lambda run: (run / "scores.json").write_text(
            '{"scores": [{"value": null}, {"name": 3, "value": "x", "bar": 1}, 5]}'
        ),
        lambda run: (run / "samples" / "step-00000001").mkdir(parents=True),
    ],
)
def test_whatever_is_missing_there_is_a_page_that_says_so(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    check(html)
    assert "Not in this report" in html


def test_a_folder_that_is_not_there_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_stages_go_by_natural_order(tmp_path: Path) -> None:
    for name in ("stage10", "stage2_phase2", "stage2_phase1", "stage4_router", "stage4_expert"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "logs").mkdir()
    names = [folder.name for folder in stage_folders(tmp_path)]
    assert names == ["stage2_phase1", "stage2_phase2", "stage4_expert", "stage4_router", "stage10"]


def test_time_is_split_with_each_record_for_the_steps_since_the_one_before(tmp_path: Path) -> None:
    records = [
        {"step": 1, "step_s": 9.0, "data/wait_s": 1.0, "checkpoint/stall_s": 0.0},
        {"step": 10, "step_s": 1.0, "data/wait_s": 0.1, "checkpoint/stall_s": 4.0},
        {"step": 20, "step_s": 1.0, "data/wait_s": 0.2},
    ]
    stage = StageRun("stage1", tmp_path, records, {}, {}, "", [])
    assert stage.time_split() == pytest.approx((9 + 9 + 10 - 3.9, 1 + 0.9 + 2, 4.0))
    assert stage.seconds == pytest.approx(28 - 3.9 + 3.9 + 4.0)
    assert StageRun("stage1", tmp_path, [{"step": 1}], {}, {}, "", []).time_split() is None


def test_validation_is_drawn_where_it_was_and_forgetting_is_said(tmp_path: Path) -> None:
    """Lines join the steps that have a validation; a stage without averaged weights has no chart of them."""
    make_stage(tmp_path / "stage1", steps=20)
    html = render_report(tmp_path / "stage1")
    assert 'id="validation"' not in html
    path = tmp_path / "stage1" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records[4::5]:
        values = {"val/loss/i2t": 2.0, "val/loss/it2i": 0.5, "val/copy/it2i": 0.7, "val/answers": 0.25}
        record |= {**values, "val/forgotten": int(record["step"] == 15)}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    html = render_report(tmp_path / "stage1")
    check(html)
    assert "Understanding had fallen at Stage 1 step 15." in html
    charts = page_data(html)["charts"]
    assert {"val", "answers"} <= charts.keys() and "val-ema" not in charts
    assert [line["name"] for line in charts["val"]] == ["understanding (i2t)", "editing (it2i)", "copied source (it2i)"]
    (answers,) = charts["answers"]
    assert [value for value in answers["y"] if value is not None] == [25.0] * 4


def test_runs_that_lie_side_by_side_are_not_the_stages_of_one(tmp_path: Path) -> None:
    def add(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"init: {{from: {source}}}\n")

    add("align", "models/initial")
    add("pretrain", str(tmp_path / "align"))
    add("stage2", f"s3://bucket/{tmp_path.name}/pretrain")
    write_report(tmp_path)
    add("other", "null")
    add("third", "runs/elsewhere/stage1")
    with pytest.raises(UserError, match=r"holds 3 runs that do not start from each other \(align, other, third\)"):
        write_report(tmp_path)


def test_the_time_of_all_starts_is_in_the_bar_the_card_and_the_head(tmp_path: Path) -> None:
    make_stage(tmp_path / "stage1")
    (tmp_path / "stage1" / "starts.jsonl").write_text(
        "".join(json.dumps({"step": step, "world_size": size}) + "\n" for step, size in ((0, 4), (20, 2)))
    )
    lines = [
        {"begun_unix": 1000, "time_unix": 1010, "step": 0},
        {"time_unix": 1035, "step": 25, "step_s": 24, "data_wait_s": 1},
        {"begun_unix": 1045, "time_unix": 1050, "step": 20},
        {"time_unix": 1060, "step": 30, "step_s": 10},
    ]
    (tmp_path / "stage1" / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = render_report(tmp_path / "stage1")
    check(html)
    assert "<small>30 steps · 1:00</small>" in html
    assert "<dt>Duration</dt><dd>1:00</dd>" in html
    assert f"<dt>Goodput</dt><dd>{(24 * 20 / 25 + 10) / 60:.1%}</dd>" in html
    assert re.search(r"<em>1:00<small>steps computed again 8%, data wait 2%, start and compile 25%, restart 17%<", html)
    assert 'class="restart" d="M666.7,0V1000"' in html
    assert "Dashed lines: the run was started again" in html
