"""The importers by name, with what the command line says about each. Importing this file imports no library."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Format:
    """A public format and its importer."""

    function: str
    """The importer (importers/item.py), as module:function of this package."""
    help: str
    dataset: str
    """Default of --dataset."""
    licence: str = "unknown"
    """Default of --licence, as the set's card states it."""

    def load(self) -> Callable[..., Any]:
        """The importer: an `Importer` of importers/item.py."""
        return pkgutil.resolve_name(f"data_pipelines.prepare.importers.{self.function}")


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "llava-pretrain": Format(
            "llava_json:llava_json_parts",
            "LLaVA-Pretrain (LLaVA-558K): its JSON, and images.zip or the folder of its images",
            "LLaVA-Pretrain",
            "other (LAION, CC, SBU)",
        ),
        "llava-json": Format(
            "llava_json:llava_json_parts",
            "any set of {image, conversations}, as JSON or JSON lines: MathV360K, ...",
            "llava-json",
        ),
        "llava-onevision": Format(
            "llava_onevision:llava_onevision_parts",
            "LLaVA-OneVision-Data: parquet with image and conversations",
            "LLaVA-OneVision-Data",
            "Apache-2.0 (its sources differ)",
        ),
        "finevision": Format(
            "finevision:finevision_parts",
            "FineVision: parquet with images, texts and ratings",
            "FineVision",
            "its sources differ",
        ),
        "omniedit": Format(
            "omniedit:omniedit_parts",
            "OmniEdit-Filtered-1.2M: parquet with src_img, edited_img and edited_prompt_list",
            "OmniEdit-Filtered-1.2M",
            "MIT",
        ),
        "img2dataset": Format(
            "img2dataset:img2dataset_parts",
            "tars of img2dataset (LAION, ...), each with its parquet file",
            "img2dataset",
        ),
        "x2i2": Format("x2i2:x2i2_parts", "X2I2 of OmniGen2: jsons/SUBSET/SUBSET.jsonl and images/SUBSET", "X2I2"),
        "bagel": Format(
            "bagel:bagel_parts", "BAGEL's forms: parquet of captions, of edits, JSON lines of conversations", "bagel"
        ),
        "energon": Format(
            "energon:energon_parts",
            "tars of megatron-energon (captions, questions, texts), or a metadataset.yaml; other tars with --map",
            "energon",
        ),
        "hf-parquet": Format("hf_parquet:hf_parquet_parts", "any parquet set; --map names its columns", "hf-parquet"),
        "folder": Format(
            "image_folder:image_folder_parts",
            "a folder of images with captions beside them (name.txt), or a CSV or JSON lines of their names",
            "folder",
        ),
        "tuxpaint-stamps": Format(
            "tuxpaint_stamps:tuxpaint_parts",
            "the folder stamps of Tux Paint: images with captions in many languages",
            "tuxpaint-stamps",
            "GPL-2",
        ),
        "openclipart": Format(
            "openclipart:openclipart_parts",
            "the folder png of Open Clip Art: drawings with names",
            "openclipart",
            "public domain",
        ),
    }
)
"""Every importer that takes SOURCE OUT."""
