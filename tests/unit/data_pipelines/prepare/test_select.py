"""Selections: the rules against a plain Python computation, and training on them against training on copied shards."""

import hashlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.cli import main
from data_pipelines.loader.loader import Stream
from data_pipelines.prepare.annotate import column_file
from data_pipelines.prepare.select_rows import EngineLimits, read_sources, select_rows
from data_pipelines.prepare.selection_rules import SelectionRules, aspect_bucket, operators_in
from data_pipelines.shards.check import check_folder
from data_pipelines.shards.index import read_manifest
from emma_train.errors import UserError
from tests.helpers import ASSETS, assert_same_pack, tiny_recipe
from tests.public_formats import write_tar
from tests.shards import every_task, png, prompt, question, write_shards

pytest.importorskip("duckdb")
LIMITS = EngineLimits(memory_gib=1, threads=1)
KINDS = ("portrait", "general", None)
ASPECTS = ("1:1", "2:1", "1:2")


def annotated(folder: Path, num: int, per_shard: int = 7, first: int = 0) -> Path:
    """Prompts with columns `score` (value, with ties and nulls; kind; aspect), by the number in the key."""
    write_shards(folder, [prompt(f"p{i:03d}") for i in range(first, first + num)], per_shard=per_shard)
    for tar in sorted(folder.glob("*.tar")):
        keys = pq.read_table(tar.with_suffix("").with_suffix(".idx.parquet"), columns=["key"])["key"].to_pylist()
        pq.write_table(
            pa.Table.from_pylist([{"key": key, **facts(key)} for key in keys[1:]]), column_file(tar, "score")
        )
    return folder


def facts(key: str) -> dict[str, Any]:
    rng = random.Random(key)
    value = None if rng.random() < 0.1 else float(rng.randrange(20))
    return {"value": value, "kind": KINDS[rng.choice((0, 1, 1, 2))], "aspect": rng.choice(ASPECTS)}


def selected_keys(folder: Path) -> list[str]:
    return [
        key
        for entry in read_manifest(folder)["shards"]
        for key in pq.read_table(folder / entry["name"].replace(".tar", ".idx.parquet"))["key"].to_pylist()
    ]


def select(out: Path, *folders: Path, **rules: Any) -> list[str]:
    select_rows(out, read_sources(folders), SelectionRules(**rules), LIMITS)
    return selected_keys(out)


def tie(key: str, seed: int = 0) -> str:
    return hashlib.md5(f"{seed}/{key}".encode()).hexdigest()


def all_facts(num: int, per_shard: int = 7) -> dict[str, dict[str, Any]]:
    """Of rows with columns: the first record of each shard was rejected."""
    keys = [f"p{i:03d}" for i in range(num) if i % per_shard]
    return {key: facts(key) for key in keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated(tmp_path_factory.mktemp("select") / "set", 80)


def test_where_keeps_rows_for_which_it_is_true_and_null_is_not(folder: Path, tmp_path: Path) -> None:
    keys = select(tmp_path / "out", folder, where=("score.value >= 5", "score.kind = 'general'"))
    expected = [k for k, f in all_facts(80).items() if (f["value"] or 0) >= 5 and f["kind"] == "general"]
    assert keys == expected and 5 < len(keys) < 60
    counts = read_manifest(tmp_path / "out")["provenance"]["rows_left"]
    assert counts["rows"] == 80 and counts["selected"] == counts["score.kind = 'general'"] == len(keys)


def test_top_takes_the_best_with_ties_by_a_hash_of_seed_and_key(folder: Path, tmp_path: Path) -> None:
    rows = all_facts(80)
    best = sorted(rows, key=lambda key: (-1e9 if rows[key]["value"] is None else rows[key]["value"],), reverse=True)
    for seed in (0, 1):
        ranked = sorted(
            best, key=lambda key: (-(rows[key]["value"] if rows[key]["value"] is not None else -1e9), tie(key, seed))
        )
        keys = select(tmp_path / str(seed), folder, best="score.value", top=11, seed=seed)
        assert sorted(keys) == sorted(ranked[:11])


def test_balance_takes_as_many_of_each_value_and_none_of_unknown(folder: Path, tmp_path: Path) -> None:
    keys = select(tmp_path / "out", folder, balance="score.kind", best="score.value")
    rows = all_facts(80)
    counts = Counter(rows[key]["kind"] for key in keys)
    rarest = min(Counter(f["kind"] for f in rows.values() if f["kind"]).values())
    assert counts == {"portrait": rarest, "general": rarest}
    capped = select(tmp_path / "capped", folder, balance="score.kind", top=4)
    assert Counter(rows[key]["kind"] for key in capped) == {"portrait": 4, "general": 4}


def test_spread_takes_the_best_of_each_aspect_in_turn(folder: Path, tmp_path: Path) -> None:
    rows = all_facts(80)
    keys = select(tmp_path / "out", folder, balance="score.kind", spread="score.aspect", best="score.value", top=9)
    assert Counter((rows[key]["kind"], rows[key]["aspect"]) for key in keys) == {
        (kind, aspect): 3 for kind in ("portrait", "general") for aspect in ASPECTS
    }
    for kind, aspect in ((kind, aspect) for kind in ("portrait", "general") for aspect in ASPECTS):
        values = sorted(f["value"] or -1 for f in rows.values() if (f["kind"], f["aspect"]) == (kind, aspect))
        taken = sorted(
            rows[key]["value"] or -1 for key in keys if (rows[key]["kind"], rows[key]["aspect"]) == (kind, aspect)
        )
        assert taken == values[-3:]


def test_per_is_a_quota_and_smaller_values_keep_all(folder: Path, tmp_path: Path) -> None:
    rows = all_facts(80)
    keys = select(tmp_path / "out", folder, where=("score.value IS NOT NULL",), per="score.value", top=2)
    available = Counter(f["value"] for f in rows.values() if f["value"] is not None)
    assert Counter(rows[key]["value"] for key in keys) == {value: min(2, n) for value, n in available.items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_threads_and_order_of_folders_change_no_byte_and_seeds_do(folder: Path, tmp_path: Path) -> None:
    other = annotated(tmp_path / "other", 30, first=100)
    rules = SelectionRules(balance="score.kind", spread="score.aspect", best="score.value", top=12)
    select_rows(tmp_path / "one", read_sources([folder, other]), rules, EngineLimits(1, 1))
    select_rows(tmp_path / "two", read_sources([other, folder]), rules, EngineLimits(1, 4))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    seeds = [set(select(tmp_path / f"seed{seed}", folder, top=20, seed=seed)) for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_a_smaller_selection_in_the_same_folder_leaves_nothing_of_the_former(folder: Path, tmp_path: Path) -> None:
    select(tmp_path / "out", folder)
    select(tmp_path / "out", folder, where=("key < 'p010'",))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "shard-000000.idx.parquet", "shard-000001.idx.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"where": ("size.width > 3",)}, "not all shards have columns of size; run `emma-data annotate` first"),
        ({"where": ("score.valu > 3",)}, "--where score.valu > 3: .*valu"),
        ({"where": ("score.value >",)}, "--where score.value >: "),
        ({"where": ("key = 'nothing'",)}, "nothing is selected; rows that are left after each rule: rows: 80, key"),
        ({"where": ("TRUE; DROP TABLE x",)}, "is no single expression"),
        ({"per": "score.kind"}, "give --top too"),
    ],
)
def test_wrong_rules_are_one_line(folder: Path, tmp_path: Path, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        select(tmp_path / "out", folder, **rules)
    assert "\n" not in str(error.value)


def test_names_in_texts_and_numbers_are_no_operators() -> None:
    rules = SelectionRules(where=("source = 'a.b' AND judge_edit.score > 0.5 AND aesthetic.score > 1.e3",))
    assert operators_in(rules, ["judge-edit", "aesthetic", "size"]) == ["aesthetic", "judge-edit"]


def test_aspect_buckets_are_the_nearest_ratio() -> None:
    import duckdb

    sql = aspect_bucket("w", "h")
    for width, height, name in ((512, 512, "1:1"), (640, 480, "4:3"), (1920, 1080, "16:9"), (300, 1200, "1:2")):
        row = duckdb.connect().execute(f"SELECT {sql} FROM (SELECT {width} AS w, {height} AS h)").fetchone()
        assert row == (name,)


def steps(folder: Path, **mix: int) -> list[Any]:
    recipe = tiny_recipe(
        data__sources=[{"path": str(folder)}], data__slots=6, data__samples_per_step=6 * len(mix),
        data__shuffle_window=8,
        **{f"mix__{task}": mix.get(task, 0) for task in ("i2t", "t2i", "it2i")},
    )  # fmt: skip
    return list(Stream(recipe, 0, 1, None).steps(1, 6))


@pytest.mark.seconds
def test_training_on_a_selection_is_training_on_the_copied_shards(tmp_path: Path) -> None:
    """Same digests, and the same packs bit for bit."""
    write_shards(tmp_path / "set", every_task(20), per_shard=[9, 13])
    rules = ["--where", "hash(key) % 3 > 0", "--tag", "CASE WHEN key < 'q010' AND task = 'i2t' THEN 'stem' END"]
    assert main(["select", str(tmp_path / "selection"), "--from", str(tmp_path / "set"), *rules]) == 0
    tokenizer = ["--tokenizer", str(ASSETS / "tokenizer"), "--workers", "1"]
    assert main(["materialize", str(tmp_path / "selection"), str(tmp_path / "copy"), *tokenizer]) == 0
    assert check_folder(tmp_path / "copy") == [] == check_folder(tmp_path / "selection")
    selection, copy = (steps(tmp_path / name, i2t=1, t2i=1, it2i=1) for name in ("selection", "copy"))
    assert [step.digest for step in selection] == [step.digest for step in copy]
    labels = set()
    for one, other in zip(selection, copy, strict=True):
        for pack, other_pack in zip(one.packs, other.packs, strict=True):
            assert_same_pack(pack, other_pack)
            labels |= set(pack.stem_labels)
    assert 1 in labels and len(labels) == 2  # the tag of the selection is the router's label
    assert [step.digest for step in steps(tmp_path / "set", i2t=1, t2i=1, it2i=1)] != [s.digest for s in selection]


def foreign_members(name: str, key: str, number: int) -> list[tuple[str, bytes]]:
    """A record of a tar of others, with fields and members that a map does not name."""
    turns = [{"from": "human", "value": f"<image> {number}?"}, {"from": "gpt", "value": "A cat."}]
    values = {"caption": [f"cat {number}", " ", "a cat"], "turns": turns, "how": ["a dog", "to a dog"], "url": "x"}
    images = ["src.png", "tgt.png"] if name == "it2i" else ["jpg.png"]
    members = [("json", json.dumps(values | {"tags": ["stem"], "i2t": "theirs"}).encode()), ("txt", b"other")]
    return [(f"{key}.{part}", data) for part, data in [*members, *((image, png(number)) for image in images)]]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t2i", ["--caption", "json:caption"]),
        ("i2t", ["--turns", "json:turns"]),
        ("it2i", ["--source", "src.png", "--target", "tgt.png", "--instruction", "json:how"]),
    ],
)
def test_training_on_a_copy_of_mapped_shards_is_training_on_their_selection(
    tmp_path: Path, name: str, options: list[str]
) -> None:
    keys = [f"sub/r{number:02d}" for number in range(12)]
    members = [part for number, key in enumerate(keys) for part in foreign_members(name, key, number)]
    write_tar(tmp_path / "set/a.tar", members)
    tokenizer = ["--tokenizer", str(ASSETS / "tokenizer"), "--workers", "1"]
    assert main(["index", str(tmp_path / "set"), *tokenizer, *options]) == 0
    selection, copy = tmp_path / "selection", tmp_path / "copy"
    assert main(["select", str(selection), "--from", str(tmp_path / "set"), "--where", "hash(key) % 3 > 0"]) == 0
    assert main(["materialize", str(selection), str(copy), *tokenizer]) == 0
    assert check_folder(copy) == []
    assert not (copy / "map.json").exists() and read_manifest(copy)["samples"] == read_manifest(selection)["samples"]
    one, other = steps(selection, **{name: 1}), steps(copy, **{name: 1})
    assert [step.digest for step in one] == [step.digest for step in other]
    for step, other_step in zip(one, other, strict=True):
        for pack, other_pack in zip(step.packs, other_step.packs, strict=True):
            assert_same_pack(pack, other_pack)
    with tarfile.open(copy / "shard-000000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".json"))
        record = json.load(tar.extractfile(member))  # type: ignore[arg-type]
    assert record["url"] == "x" and record["tags"] == ["stem"]


@pytest.mark.seconds
def test_captions_of_a_column_are_alternatives_that_training_draws(tmp_path: Path) -> None:
    """Of a plain caption pair and of a record with alternatives; in the selection and in its copy."""
    folder = tmp_path / "set"
    pairs = [(f"c{i}", {"tags": []}, {"png": png(i), "txt": b"an old caption"}) for i in range(6)]
    write_shards(folder, [*pairs, *(prompt(f"p{i}") for i in range(6))], per_shard=8)
    for tar in sorted(folder.glob("*.tar")):
        keys = pq.read_table(tar.with_suffix("").with_suffix(".idx.parquet"), columns=["key"])["key"].unique()
        captions = [f"a new caption of {key}" for key in keys.to_pylist()]
        pq.write_table(pa.table({"key": keys, "caption": captions}), column_file(tar, "caption"))
    tokenizer = ["--tokenizer", str(ASSETS / "tokenizer")]
    command = ["select", str(tmp_path / "selection"), "--from", str(folder), "--captions", "caption.caption"]
    assert main([*command, "--task", "t2i"]) == 2
    assert main([*command, "--task", "t2i", *tokenizer]) == 0
    assert main(["materialize", str(tmp_path / "selection"), str(tmp_path / "copy"), *tokenizer, "--workers", "1"]) == 0
    columns = ["key", "text_tokens", "supervised_tokens", "context", "target"]
    for shard in ("shard-000000", "shard-000001"):
        one, other = (
            pq.read_table(tmp_path / name / f"{shard}.idx.parquet", columns=columns, filters=[("task", "=", "t2i")])
            for name in ("selection", "copy")
        )
        assert one.to_pylist() == other.to_pylist() and {len(n) for n in one["text_tokens"].to_pylist()} == {2}
    recipe = {name: tiny_recipe(
        data__sources=[{"path": str(tmp_path / name), "tasks": ["t2i"]}], data__slots=6, data__samples_per_step=6,
        mix__i2t=0, mix__t2i=1, mix__it2i=0,
    ) for name in ("selection", "copy")}  # fmt: skip
    streams = [list(Stream(recipe[name], 0, 1, None).steps(1, 8)) for name in ("selection", "copy")]
    assert [step.digest for step in streams[0]] == [step.digest for step in streams[1]]
    assert not any(step.unreadable for stream in streams for step in stream)
    for one_step, other_step in zip(*streams, strict=True):
        for pack, other_pack in zip(one_step.packs, other_step.packs, strict=True):
            assert_same_pack(pack, other_pack)


def test_a_selection_of_one_task_leaves_the_others_out_of_the_copy_too(tmp_path: Path) -> None:
    write_shards(tmp_path / "set", every_task(4), per_shard=5)
    select(tmp_path / "selection", tmp_path / "set", tasks=("it2i",))
    command = [
        "materialize",
        str(tmp_path / "selection"),
        str(tmp_path / "copy"),
        "--tokenizer",
        str(ASSETS / "tokenizer"),
    ]
    assert main([*command, "--workers", "1"]) == 0
    for name in ("selection", "copy"):
        assert read_manifest(tmp_path / name)["samples"] == {"i2t": 0, "t2i": 0, "it2i": 4}


def test_annotate_on_a_selection_reads_its_records_alone_and_select_goes_on_from_it(
    tmp_path: Path, folder: Path
) -> None:
    chosen = select(tmp_path / "one", folder, where=("score.value > 10",))
    assert main(["annotate", "size", str(tmp_path / "one"), "--workers", "1"]) == 0
    columns = [pq.read_table(path) for path in sorted((tmp_path / "one").glob("*.size.parquet"))]
    assert [key for table in columns for key in table["key"].to_pylist()] == chosen
    both = select(tmp_path / "two", tmp_path / "one", where=("size.width = 32", "score.kind = 'general'"))
    assert both == [key for key in chosen if facts(key)["kind"] == "general"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "moved"])
def test_a_selection_whose_shards_changed_is_refused(tmp_path: Path, damage: str) -> None:
    write_shards(tmp_path / "set", [question(f"q{i}") for i in range(3)])
    select(tmp_path / "out", tmp_path / "set")
    tar = tmp_path / "set" / "shard-000000.tar"
    if damage == "missing":
        tar.unlink()
        message = "missing, but the selection .* takes rows of it; select again"
    elif damage == "shorter":
        tar.write_bytes(tar.read_bytes()[:-512])
        message = "the manifest says"
    else:
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        manifest["shards"][0]["tar"] = "../set/shard-000000.txt"
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
        message = "is no path of a tar"
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / "out")


def test_two_selections_of_the_same_shards_are_different_content(tmp_path: Path, folder: Path) -> None:
    """A run that resumes on the other one must not take it for the same data."""
    from data_pipelines.planner.pools import content_id
    from data_pipelines.planner.sources import Sources

    ids = set()
    for name, keys in (("one", "p000"), ("two", "p001")):
        select(tmp_path / name, folder, where=(f"key = '{keys}'",))
        recipe = tiny_recipe(data__sources=[{"path": str(tmp_path / name)}])
        from emma_train.sequence.tokens import TextTokenizer

        sources = Sources(recipe.data, TextTokenizer(recipe.data.tokenizer))
        ids.add(content_id(sources._shards_of(recipe.data.sources[0], "t2i")))
    assert len(ids) == 2
