"""`stem`: whether a record is of science, technology, engineering or mathematics, by the source that it is from.

The label is `stem`, `general` or `unknown`. A tag of the record decides; else its source, by the table below; a source
that the table does not know is `unknown`, which is not `general`. A VLM may judge those: `stem-vlm`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord

STEM_SOURCES = (
    "ai2d", "arxivqa", "chart2text", "chartqa", "clevr_math", "dvqa", "figureqa", "finqa", "geo170k", "geo3k",
    "geometry3k", "geomverse", "geoqa", "geos", "iconqa", "infographic_vqa", "inter_gps", "intergps",
    "k12_printing", "latex_ocr", "latexformulas", "llavar_math", "mapqa", "mathqa", "mathv360k", "mathverse",
    "mathvision", "mathwriting", "mavis", "mmmu", "pathvqa", "plotqa", "pmc_vqa", "raven", "scienceqa", "slake",
    "super_clevr", "tabmwp", "tqa", "unigeo", "vision_flan_stem", "vqarad", "websight", "unichart", "chemistry",
    "physics", "biology", "molmo_charts", "cosyn_400k_chart", "cosyn_400k_chemical", "cosyn_400k_circuit",
    "cosyn_400k_diagram", "cosyn_400k_math",
)  # fmt: skip
"""Names of public sources and configs (LLaVA-OneVision-Data, FineVision, MathV360K), normalised as `source_name`."""
GENERAL_SOURCES = (
    "allava", "aokvqa", "a_okvqa", "captcha", "coco", "cocoqa", "coco_colors", "densefusion", "face_emotion",
    "flickr30k", "gqa", "hateful_memes", "idk", "image_textualization", "laion_gpt4v", "llava", "llava_158k",
    "llava_558k", "llava_instruct", "llava_150k", "llava_665k", "localized_narratives", "lrv_normal", "lnqa",
    "lvis_instruct4v", "mimic_cgd", "mmevol", "nlvr2", "okvqa", "oodvqa", "place", "refcoco", "sharegpt4o",
    "sharegpt4v", "sketchyvqa", "spot_the_diff", "st_vqa", "svit", "tallyqa", "textcaps", "textocr", "textvqa",
    "vg", "vision_flan", "visual7w", "visualgenome", "vistext", "vizwiz", "vqaonbd", "vqav2", "vsr", "wildvision",
)  # fmt: skip


def source_name(source: str) -> str:
    """A source's name as the tables have it: lower case, words joined by _, without what stands in parentheses."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\(.*?\)", "", source.lower())).strip("_")


def stem_label(source: str, stem: Sequence[str] = STEM_SOURCES, general: Sequence[str] = GENERAL_SOURCES) -> str:
    """stem, general or unknown. A name of a table matches a source that is it, or begins with it and a further word;
    the longest match decides. `geo170k(align)` and `MathV360K_VQA` are stem."""
    name = source_name(source)
    parts = {name, source_name(source.rpartition("/")[2])}
    parts |= {source_name(inner) for inner in re.findall(r"\(([^)]*)\)", source)}
    matches = [
        (len(known), label)
        for label, names in (("stem", stem), ("general", general))
        for known in names
        for part in parts
        if part == known or part.startswith(f"{known}_")
    ]
    return max(matches)[1] if matches else "unknown"


def record_source(record: StoredRecord) -> str:
    """The source that an importer noted: in the columns `source`, or in the record's provenance (config or dataset)."""
    provenance = record.fields.get("provenance")
    provenance = provenance if isinstance(provenance, dict) else {}
    by_row = record.columns.get("source", {}).get("source")
    values = (by_row, provenance.get("config"), provenance.get("dataset"))
    return next((value for value in values if isinstance(value, str) and value), "")


def _start(settings: Mapping[str, Any]) -> Annotate:
    stem = (*STEM_SOURCES, *map(source_name, settings["stem"]))
    general = (*GENERAL_SOURCES, *map(source_name, settings["general"]))

    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        tags, source = record.tags, record_source(record)
        by_tag = next((tag for tag in ("stem", "general") if tag in tags), "")
        return {"label": by_tag or stem_label(source, stem, general), "source": source}

    return for_each_record(annotate_one)


STEM_OPERATOR = Operator(
    "stem",
    1,
    {"label": pa.string(), "source": pa.string()},
    _start,
    {"stem": [], "general": []},
    optional_reads=("source",),
)
"""The settings add names of sources to the two tables."""
