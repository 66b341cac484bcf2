"""One HTML page for a run folder, or for a pipeline's folder with one run folder per stage in it.

The page contains everything (style, charts, images) and loads nothing, so that it can be mailed or archived. If files
are missing or torn, there is a page nevertheless, and it says what is missing.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.report.charts import Axis, Chart
from emma_train.report.gallery import samples_html
from emma_train.report.metrics import loss_charts, loss_warning, machine_charts, run_axis
from emma_train.report.overview import header_html, tiles_html
from emma_train.report.page import html_page, html_section
from emma_train.report.scores import scores_html, sheet_html
from emma_train.report.stage_run import StageRun, first_stages, read_object, read_scores, read_stage_run, stage_folders
from emma_train.report.times import times_html
from emma_train.report.validation import forgetting_warning, validation_charts
from emma_train.storage.files import write_atomic

RUN_FILES = ("scores.json", "samples", "summary.json", "environment.json")
"""What a page can show where there are neither metrics nor a config."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder or a pipeline's folder, `report.html` in it unless `out` says otherwise.

    Returns its path. Raises UserError if the folder does not exist or holds no run, or the page cannot be written.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give a run folder such as runs/NAME")
    if not stage_folders(run) and not any((run / name).exists() for name in RUN_FILES):
        raise UserError(f"{run} holds no run: neither metrics.jsonl nor config.yaml is here or one folder below")
    if len(starts := first_stages(stage_folders(run))) > 1:
        raise UserError(
            f"{run} holds {len(starts)} runs that do not start from each other ({', '.join(starts[:5])}"
            f"{', ...' * (len(starts) > 5)}), not the stages of one; give one of them, or several to compare them"
        )
    path = out or run / "report.html"
    try:
        write_atomic(path, render_report(run))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def render_report(run: Path) -> str:
    """The page of a run folder as HTML."""
    missing: list[str] = []
    stages = [read_stage_run(folder, missing) for folder in stage_folders(run)]
    pipeline_scores = [] if [s.folder for s in stages] == [run] else read_scores(run, missing)
    scores = pipeline_scores + [score for stage in stages for score in stage.scores]
    environment = read_object(run / "environment.json") or next((s.environment for s in stages if s.environment), {})
    axis = run_axis(stages)
    losses, machine = loss_charts(axis, stages), machine_charts(axis, stages)
    validations = validation_charts(axis, stages)
    if not stages:
        missing.append("no stage was found: neither metrics.jsonl nor config.yaml is here or one folder below")
    if not any(stage.snapshots for stage in stages):
        missing.append("no sample images: samples/step-*/samples.json is not there")
    if not scores:
        missing.append("no scores: scores.json is not there")
    body = "".join(
        (
            header_html(run, stages, scores, environment),
            _stages_section(stages),
            _scores_section(scores),
            _judged_section([run, *(stage.folder for stage in stages)]),
            _samples_section(stages),
            _losses_section(losses, stages, axis),
            _validation_section(validations, stages),
            _machine_section(machine, stages),
            _files_section(stages, environment),
            _missing_section(missing),
            "<footer>Written by <code>emma-train report</code>. This file is whole and loads nothing.</footer>",
        )
    )
    data = _script_data(axis, [*losses, *validations, *machine])
    return html_page(f"{run.resolve().name} · EMMA training report", body, data)


def _script_data(axis: Axis, charts: list[Chart]) -> dict[str, Any]:
    """What the page's script reads: the records under the pointer, their stages, and the values of each chart."""
    hover = axis.hover()
    return {
        "x": axis.x[hover].tolist(),
        "step": axis.step[hover].astype(int).tolist(),
        "stage": axis.band[hover].astype(int).tolist(),
        "stages": [band.label for band in axis.bands],
        "end": axis.end,
        "charts": {chart.key: chart.hover for chart in charts},
    }


def _stages_section(stages: list[StageRun]) -> str:
    if not stages:
        return ""
    note = "What each stage trained, and its loss from first to last step, smoothed."
    return html_section("stages", "Stages", note, tiles_html(stages))


def _scores_section(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return ""
    return html_section("scores", "Scores", "Measured after training, on the named split.", scores_html(scores))


def _judged_section(folders: list[Path]) -> str:
    """The contact sheet of the first folder that has one."""
    sheets = (sheet_html(folder / "scores" / "sheet.png") for folder in folders)
    note = (
        "Prompts and edits of the held-out splits. Green: all that was asked for is read from the image; red: not all."
    )
    return next((html_section("judged", "What was scored", note, sheet) for sheet in sheets if sheet), "")


def _samples_section(stages: list[StageRun]) -> str:
    snapshots = [snapshot for stage in stages for snapshot in stage.snapshots]
    if not snapshots:
        return ""
    note = "The same prompts while the model learns. Of its answers, those that differ from the one before are shown."
    return html_section("samples", "What it makes and says", note, samples_html(snapshots))


def _losses_section(charts: list[Chart], stages: list[StageRun], axis: Axis) -> str:
    if not charts:
        return ""
    note = "Steps are counted through the whole run. Light lines are single steps, bold ones a centred average."
    if axis.restarts:
        note += " Dashed lines: the run was started again from there."
    body = loss_warning(stages) + "".join(chart.html for chart in charts)
    return html_section("losses", "Losses", note, body)


def _validation_section(charts: list[Chart], stages: list[StageRun]) -> str:
    if not charts:
        return ""
    grid = f'<div class="charts">{"".join(chart.html for chart in charts)}</div>'
    note = "Measured on held-out data while it learned."
    return html_section("validation", "Validation", note, forgetting_warning(stages) + grid)


def _machine_section(charts: list[Chart], stages: list[StageRun]) -> str:
    times = times_html(stages)
    if not charts and not times:
        return ""
    grid = f'<div class="charts">{"".join(chart.html for chart in charts)}</div>' if charts else ""
    return html_section("machine", "Optimizer and machine", "How it was driven, and where the time went.", times + grid)


def _files_section(stages: list[StageRun], environment: dict[str, Any]) -> str:
    files = [(f"Config of {stage.label}", stage.config) for stage in stages if stage.config]
    if environment:
        files.append(("Environment", json.dumps(environment, indent=2, ensure_ascii=False)))
    if not files:
        return ""
    body = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in files
    )
    return html_section("files", "Config and environment", "As resolved before step 0.", f"<div>{body}</div>")


def _missing_section(missing: list[str]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in missing)
    body = f'<div class="card"><ul class="missing">{items}</ul></div>'
    return html_section("missing", "Not in this report", "What the run folder lacks.", body)
