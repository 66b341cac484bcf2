"""A Hugging Face model card beside an export: README.md, with scores where the hub and people look for them."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from emma_train.errors import UserError
from emma_train.storage.files import write_atomic

CARD_FILE = "README.md"
BEGIN, END = "<!-- scores of emma-train evaluate: begin -->", "<!-- scores of emma-train evaluate: end -->"
"""What is between these lines is written anew; the rest of a card belongs to its author."""
EDIT_BENCHMARKS = ("gedit", "imgedit")

BODY = """# {name}

A unified multimodal model of the EMMA architecture ([arXiv 2512.04810](https://arxiv.org/abs/2512.04810)), trained
with emma_train: it answers questions about images, makes images from text and edits images. Stage {stage}, step {step},
{millions:,.1f} million parameters.

```
emma-train generate FOLDER --task t2i --prompt "..." --out images
```

FOLDER is a local copy of this repository. `recipe.yaml` is the recipe that trained it, `generation.json` how it
generates.

## Evaluation

{begin}
{end}
"""


def write_card(
    export: Path,
    dataset: str,
    scores: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    num_parameters: int,
) -> Path:
    """Put scores into the card of an export, in place of earlier ones of the same data set; make the card if there is
    none.

    dataset: emoji, or a benchmark's name; config: the settings of the evaluation; meta: stage and step of the export.
    Raises UserError where the card that exists cannot be read.
    """
    path = export / CARD_FILE
    name = export.resolve().name
    if path.is_file():
        data, text = _read_card(path)
    else:
        about = {"stage": meta["stage"], "step": meta["step"], "millions": num_parameters / 1e6}
        text = BODY.format(name=name, begin=BEGIN, end=END, **about)
        data = ModelCardData(library_name="emma_train", pipeline_tag="any-to-any", tags=["emma"], model_name=name)
    kept = [result for result in data.eval_results or [] if result.dataset_type != dataset]
    data.eval_results = [*kept, *(_result(dataset, score, config) for score in scores if _is_finite(score))]
    data.model_name = data.model_name or name
    text = _with_table(text, data.eval_results)
    write_atomic(path, f"---\n{data.to_yaml()}\n---\n{text.lstrip()}")
    return path


def _read_card(path: Path) -> tuple[ModelCardData, str]:
    """Header and text of a card."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        return ModelCardData(**card.data.to_dict()), card.text
    except Exception as error:  # YAML's errors, the hub's and what else a hand-written header brings
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its header cannot be read ({reason}); mend it, or move the file away") from error


def _is_finite(score: Mapping[str, Any]) -> bool:
    return math.isfinite(score["value"])


def _result(dataset: str, score: Mapping[str, Any], config: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=_hub_task(dataset, str(score["name"])),
        dataset_type=dataset,
        dataset_name=str(score["split"]).replace("_", " "),
        dataset_split=str(score["split"]),
        dataset_args={"limit": config.get("limit"), "ema": config.get("ema"), "experts": config.get("experts")},
        metric_type=str(score["metric"]),
        metric_name=str(score["name"]),
        metric_value=round(float(score["value"]), 4),
        metric_args={"stderr": round(float(score["stderr"]), 4), "n": score["num"], "unit": score["unit"]},
    )


def _hub_task(dataset: str, name: str) -> str:
    if dataset in EDIT_BENCHMARKS or name.startswith("edit") or name.endswith(": it2i"):
        return "image-to-image"
    return "image-text-to-text" if name.startswith("answer") else "text-to-image"


def _with_table(text: str, results: Sequence[EvalResult]) -> str:
    """The card's text with the table between its two lines, or at the end where they are missing."""
    rows = [
        f"| {r.dataset_name} | {r.metric_name} | {r.metric_value} | {(r.metric_args or {}).get('stderr', '')} "
        f"| {(r.metric_args or {}).get('n', '')} | {(r.metric_args or {}).get('unit', '')} |"
        for r in results
    ]
    head = ["| data | score | value | standard error | n | unit |", "|---|---|---|---|---|---|"]
    block = "\n".join([BEGIN, "", *head, *rows, "", END])
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n## Evaluation\n\n{block}\n"
