"""energon's metadatasets: each set of the blend is a folder of shards, and sources.yaml has their weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.cli import main
from data_pipelines.prepare.importers.metadataset import blended_sets
from data_pipelines.prepare.importers.source_files import check_source
from data_pipelines.shards.index import read_manifest
from emma_train.errors import UserError
from tests.helpers import ASSETS
from tests.more_public_formats import write_energon
from tests.public_formats import jpeg, write_tar

TOKENIZER = str(ASSETS / "tokenizer")


def captions(folder: Path, num: int) -> Path:
    members = [(f"{i}.{end}", data) for i in range(num) for end, data in (("jpg", jpeg(i)), ("txt", b"a cat"))]
    write_energon(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"}, members)
    return folder


def metadataset(path: Path, train: Any, kind: str = "MetadatasetV2") -> Path:
    path.write_text(yaml.safe_dump({"__module__": "megatron.energon", "__class__": kind, "splits": {"train": train}}))
    return path


def test_a_blend_is_a_folder_for_each_set_and_sources_with_weights(tmp_path: Path) -> None:
    captions(tmp_path / "coco", 3)
    captions(tmp_path / "coyo", 2)
    write_tar(tmp_path / "coyo/held.tar", [("h.jpg", jpeg(9)), ("h.txt", b"held out")])
    (tmp_path / "coyo/.nv-meta/split.yaml").write_text(
        "split_parts: {train: ['shard_{000..000}.tar'], val: [held.tar]}"
    )
    inner = {"datasets": [{"path": "coyo", "weight": 3}, {"path": "coyo", "weight": 1, "split_part": "val"}]}
    metadataset(tmp_path / "inner.yaml", inner, "Metadataset")
    blend = [{"path": "./coco", "weight": 5, "subflavors": {"a": 1}}, {"path": "inner.yaml", "weight": 2}]
    file = metadataset(tmp_path / "meta.yaml", {"blend": [*blend, {"path": "coco"}]})
    out = tmp_path / "out"
    command = ["import", "energon", str(file), str(out), "--tokenizer", TOKENIZER, "--workers", "1"]
    assert main(command) == 0
    sources = yaml.safe_load((out / "sources.yaml").read_text())
    assert sources == [
        {"path": f"{out}/coco", "weight": 6.0},
        {"path": f"{out}/coyo", "weight": 1.5},
        {"path": f"{out}/coyo-val", "weight": 0.5},
    ]
    assert [read_manifest(Path(source["path"]))["samples"]["t2i"] for source in sources] == [3, 2, 1]
    assert read_manifest(out / "coyo")["provenance"]["sources"][0]["dataset"] == "coyo"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert main(command) == 0 and {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_repetitions_become_weights_by_the_numbers_of_samples(tmp_path: Path) -> None:
    captions(tmp_path / "a", 3)
    captions(tmp_path / "b", 1)
    blend = [{"path": "a", "repetitions": 2}, {"path": "b", "repetitions": 5}]
    file = metadataset(tmp_path / "meta.yaml", {"blend_epochized": blend})
    out = tmp_path / "out"
    assert main(["import", "energon", str(file), str(out), "--tokenizer", TOKENIZER, "--workers", "1"]) == 0
    # a caption pair is a sample of t2i and one of i2t
    assert [source["weight"] for source in yaml.safe_load((out / "sources.yaml").read_text())] == [12.0, 10.0]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"join": [{"path": "a"}]}, r"splits.train has join; only path and blend"),
        ({"blend": [{"join": []}]}, r"splits.train.blend\[0\]: has no path"),
        ({"blend": [{"path": "a", "weight": float("nan")}]}, r"blend\[0\]: its weight or repetitions are nan"),
        ({"blend": [{"path": "missing"}]}, r"missing: no such file or folder; .*hf download"),
        ({"blend": [{"path": "s3://bucket/set"}]}, r"s3:/bucket/set: is a URL; .* aws s3 sync s3://bucket/set FOLDER"),
        ({"path": "meta.yaml"}, "more than 8 deep; does one contain itself"),
        (["a"], "has no splits.train"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, train: Any, message: str) -> None:
    captions(tmp_path / "a", 1)
    with pytest.raises(UserError, match=message) as raised:
        blended_sets(metadataset(tmp_path / "meta.yaml", train))
    assert "\n" not in str(raised.value)


def test_other_yaml_and_an_unknown_split_part_are_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    for text in ("splits: [", "a: 1", "[1]"):
        other.write_text(text)
        with pytest.raises(UserError, match=r"other.yaml: (cannot be read|is no metadataset)"):
            blended_sets(other)
    captions(tmp_path / "a", 1)
    blend = [{"path": "a", "split_part": "test"}]
    file = metadataset(tmp_path / "meta.yaml", {"blend": blend})
    assert main(["import", "energon", str(file), str(tmp_path / "out"), "--tokenizer", TOKENIZER]) == 2


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("hf://datasets/a/b", "hf download --repo-type dataset a/b --local-dir FOLDER"),
        ("https://huggingface.co/datasets/a/b/tree/main", "hf download --repo-type dataset a/b --local-dir FOLDER"),
        ("s3://a/b", "aws s3 sync s3://a/b FOLDER"),
        ("https://a.org/b", "wget -r -np -P FOLDER https://a.org/b"),
        ("memory://a/b", "rclone copy memory://a/b FOLDER"),
    ],
)
def test_a_url_is_answered_with_the_command_that_fetches_it(url: str, command: str) -> None:
    with pytest.raises(UserError, match=f"is a URL; .* fetch it first: {command}$"):
        check_source(Path(url))
