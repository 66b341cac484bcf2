"""GPT-Image-Edit-1.5M is refused by each rule; OmniEdit, which it is made from, by none."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.planner.sources import Sources
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.excluded import (
    EXCLUDED_SET,
    refuse_columns,
    refuse_key,
    refuse_names,
    refuse_provenance,
    refuse_row,
)
from data_pipelines.shards.fetch import fetch_shards
from data_pipelines.shards.index import MANIFEST
from emma_train.config.schema import DataConfig
from emma_train.errors import UserError
from emma_train.sequence.tokens import TextTokenizer
from tests.helpers import ASSETS
from tests.shards import edit, write_shards

TOKENIZER = ASSETS / "tokenizer" / "tokenizer.json"
ROW = {
    "id": "omniedit_swap_17",
    "dataset_source": "omniedit",
    "task": "swap",
    "input": "input/17.png",
    "output": "output/17.png",
    "instruction": "swap the cat",
    "instruction_type": "rewrite",
    "input_description": "a cat",
}
GENUINE = {
    "omni_edit_id": "omniedit_is_no_start_of_an_id_here",
    "task": "swap",
    "src_img": b"",
    "edited_img": b"",
    "edited_prompt_list": ["swap the cat"],
    "o_score": 9.0,
}


def without(*names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**ROW, **changes}.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (without("dataset_source", "id"), None),
        (ROW, "rule columns"),
        (without("input_description", "id"), "rule dataset_source: omniedit"),
        (without("input_description", "dataset_source"), "rule id: omniedit_"),
        ({"id": "hqedit_edit_1"}, "rule id: hqedit_"),
        ({"key": "ultraedit_x_1"}, "rule id: ultraedit_"),
        ({"image": "data/gpt-edit/ultraedit/x/input/1.png"}, "rule path: gpt-edit/ultraedit/"),
        ({"images": ["gpt-edit/hqedit/edit/output/1.png"]}, "rule path: gpt-edit/hqedit/"),
        (GENUINE, None),
        ({"id": "omni-17", "source": "omniedit"}, None),
    ],
)
def test_rows(row: dict[str, Any], rule: str | None) -> None:
    if rule is None:
        refuse_row(row, "here")
        return
    with pytest.raises(UserError, match=rf"here: is data of {EXCLUDED_SET} \({rule}"):
        refuse_row(row, "here")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("UCSC-VLAA/GPT-Image-Edit-1.5M", "rule name: GPT-Image-Edit-1.5M"),
        ("/data/gpt-image-edit-training/x", "rule name: gpt-image-edit-training"),
        ("s3://b/gpt-edit/omniedit/swap", "rule path: gpt-edit/omniedit/"),
        *(
            (f"a/{file}.json", f"rule annotation file: {file}.json")
            for file in (
                "hqedit_gpt_edit",
                "hqedit_gpt_generate",
                "omniedit_gpt",
                "omniedit_gpt_rewrite",
                "complexedit_gpt",
                "ultraedit_gpt",
            )
        ),
        ("TIGER-Lab/OmniEdit-Filtered-1.2M/data/train-00000-of-02810.parquet", None),
        ("my_omniedit_gpt.jsonl.txt", None),
    ],
)
def test_names(name: str, rule: str | None) -> None:
    if rule is None:
        refuse_names([name], "here")
        return
    with pytest.raises(UserError, match=f"{EXCLUDED_SET} .{rule}"):
        refuse_names([name], "here")
    with pytest.raises(UserError, match=f"{EXCLUDED_SET} .{rule}"):
        refuse_provenance({"sources": [{"dataset": "mix", "parts": [name]}]}, "here")


def test_columns_and_keys() -> None:
    with pytest.raises(UserError, match="rule columns"):
        refuse_columns([*ROW, "instruction_original"], "here")
    refuse_columns(GENUINE, "here")
    with pytest.raises(UserError, match="rule id"):
        refuse_key("swap/omniedit_swap_17", "here")
    refuse_key("omniedit-00000-00000017", "here")


def test_indexing_refuses_keys_and_json_of_a_record(tmp_path: Path) -> None:
    write_shards(tmp_path / "good", [edit("a")])
    _, record, images = edit("a")
    write_shards(tmp_path / "json", [("a", {**record, "dataset_source": "ultraedit"}, images)], index=False)
    write_shards(tmp_path / "key", [("hqedit_edit_1", record, images)], index=False)
    for folder, rule in (("json", "rule dataset_source: ultraedit"), ("key", "rule id: hqedit_")):
        with pytest.raises(UserError, match=f"{EXCLUDED_SET} .{rule}"):
            index_folder(tmp_path / folder, TOKENIZER)
    with pytest.raises(UserError, match="rule name"):
        index_folder(tmp_path / "good", TOKENIZER, {"sources": [{"dataset": "GPT-Image-Edit-1.5M"}]})
    with pytest.raises(UserError, match="rule path"):
        fetch_shards(tmp_path / "fetched", ["s3://b/gpt-edit/hqedit/{000..001}.tar"], 1)


def test_training_does_not_start_from_a_manifest_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_shards(folder, [edit("a"), edit("b")])
    sources = Sources(DataConfig(), TextTokenizer(TOKENIZER))
    assert sources._manifest(str(folder))["samples"]["it2i"] == 2
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["provenance"] = {"sources": [{"dataset": "mix"}, {"dataset": "UCSC-VLAA/GPT-Image-Edit-1.5M"}]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{EXCLUDED_SET} .rule name"):
        Sources(DataConfig(), TextTokenizer(TOKENIZER))._manifest(str(folder))
