"""The card of a set: everything on one page, nothing from elsewhere, nothing that escapes its place."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.cli import main
from data_pipelines.prepare.annotate import column_file, reject_file
from data_pipelines.shards.build_index import index_folder
from tests.helpers import ASSETS
from tests.shards import prompt, write_shards

pytest.importorskip("duckdb")


@pytest.mark.seconds
def test_a_card_shows_counts_licences_histograms_rejects_removals_and_images(tmp_path: Path) -> None:
    contents = [prompt(f"p{i}", text="<script>alert(1)</script> & a fish") for i in range(40)]
    folder = write_shards(tmp_path / "set", contents, per_shard=20)
    index_folder(folder, ASSETS / "tokenizer", {"source": "x", "licence": "CC-BY-4.0"})
    for first, tar in zip((0, 20), sorted(folder.glob("*.tar")), strict=True):
        rows = [
            {"key": f"p{i}", "value": float(i), "count": i % 3, "hash": 2**60 + i % 20}
            for i in range(first, first + 18)
        ]
        pq.write_table(pa.Table.from_pylist(rows), column_file(tar, "score"))
        rejects = [{"key": "p3", "reason": "no <image>"}, {"key": "p1", "reason": "not selected"}]
        reject_file(tar, "score").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    assert main(["select", str(tmp_path / "chosen"), "--from", str(folder), "--where", "score.value >= 2"]) == 0
    assert main(["card", str(tmp_path / "chosen"), "--images", "3"]) == 0
    page = (tmp_path / "chosen" / "card.html").read_text()
    assert "CC-BY-4.0" in page and "score.value &gt;= 2" in page and "no &lt;image&gt;" in page
    assert "<script" not in page and page.count("data:image/webp;base64,") == 3
    assert re.search(r"samples of t2i<td class=n>34<", page) and "not selected" not in page
    assert "<td class=n>40<td class=n><td" in page and "<td class=n>34<td class=n>−6<td" in page
    assert len(re.findall("<rect", page)) == 24 and "2 to 37, median 20.5" in page
    assert "<td>0<td class=n>11</tr><tr><td>1<td class=n>11</tr><tr><td>2<td class=n>12</tr>" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)


def test_the_page_may_go_to_a_new_folder_but_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "set", [prompt("p0")])
    assert main(["card", str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    capsys.readouterr()
    assert main(["card", str(folder), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path}: is a folder; name a file\n"
