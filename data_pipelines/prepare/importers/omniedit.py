"""OmniEdit-Filtered-1.2M: parquet files with a source image, an edited one, and several wordings of the instruction."""

from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    clean_text,
)
from data_pipelines.prepare.importers.parquet_rows import parquet_files, parquet_part
from data_pipelines.shards.write import Record

_COLUMNS = ("src_img", "edited_img", "edited_prompt_list")
SCORES = ("width", "height", "sc_score_1", "sc_score_2", "sc_reasoning", "pq_score", "pq_reasoning", "o_score")
_OPTIONAL = ("omni_edit_id", "task", *SCORES)


def omniedit_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file."""
    files = parquet_files(source, _COLUMNS)
    return [parquet_part(file, source, _sample, _COLUMNS, _OPTIONAL, "omni_edit_id") for file in files]


def _sample(row: dict[str, Any], name: str, config: str) -> ImportedSample:
    files = {"img0": image_bytes(row["src_img"], "src_img"), "img1": image_bytes(row["edited_img"], "edited_img")}
    prompts = [clean_text(prompt) for prompt in row["edited_prompt_list"] or []]
    kind = clean_text(row.get("task"))
    record = edit_record([prompt for prompt in prompts if prompt], ["img0"], "img1", kind)
    columns = {"task": row.get("task"), **{name: row.get(name) for name in SCORES}}
    return ImportedSample(name, record, files, columns=columns, config=config)


def edit_record(instructions: list[str], images: list[str], target: str, kind: str = "") -> Record:
    """The record of an edit with an alternative for each wording. Raises ValueError where there is none."""
    if not instructions:
        raise ValueError("no instruction")
    alternative = {"images": images, "target": target, **({"kind": kind} if kind else {})}
    return {"it2i": [{**alternative, "text": instruction} for instruction in instructions]}
