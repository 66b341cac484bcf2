"""What the nodes of a job can do together: verdicts on planted differences, and ranks that really meet."""

import re
from pathlib import Path
from typing import Any

import pytest

from emma_train import node_checks
from emma_train.doctor import Check
from emma_train.engine.world import World, join
from emma_train.node_checks import check_nodes
from tests.distributed.spawn import run_command, run_ranks

FACTS = {"python": "3.11.7", "torch": "2.13.0", "commit": "0123", "device": "H100", "/dev/shm free, GiB": 64.0}


def by_name(results: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in results}


def on_two_ranks(rank: int, folder: Path, changed: dict[str, Any]) -> list[Check]:
    """The checks of two "nodes", of which the second has other facts."""
    node_checks.node_facts = lambda: {  # type: ignore[assignment]
        **FACTS, "open files": 65536, "host": f"n{rank}", **(changed if rank else {}),
    }  # fmt: skip
    if rank:
        node_checks.time.time = lambda: 1e9 + changed.get("ahead", 0.0)  # type: ignore[assignment]
        folder = Path(changed.get("folder", folder))
    else:
        node_checks.time.time = lambda: 1e9  # type: ignore[assignment]
    with join("cpu", 60) as world:
        return check_nodes(world, folder, megabytes=1)


def results(tmp_path: Path, **changed: Any) -> dict[str, Check]:
    first, second = run_ranks(2, _of_this_rank, tmp_path, changed)
    assert [check.status for check in first.value] == [check.status for check in second.value]
    return by_name(first.value)


def _of_this_rank(folder: Path, changed: dict[str, Any]) -> list[Check]:
    import os

    return on_two_ranks(int(os.environ["RANK"]), folder, changed)


@pytest.mark.seconds
def test_nodes_that_agree(tmp_path: Path) -> None:
    checks = results(tmp_path / "runs")
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["ranks"].detail == "2 on n0 (1), n1 (1)"
    assert re.fullmatch(r"1 MiB over gloo in [\d.]+ ms: [\d.]+ GB/s of bus bandwidth", checks["all-reduce"].detail)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.seconds
def test_each_planted_difference_is_named(tmp_path: Path) -> None:
    other = {"torch": "2.11.0", "/dev/shm free, GiB": 0.06, "open files": 8, "ahead": 90.0, "device": "A100"}
    checks = results(tmp_path, **other, folder=str(tmp_path / "elsewhere"))
    assert checks["torch"].status == "missing"
    assert checks["torch"].detail == "2.13.0 on n0; 2.11.0 on n1"
    assert checks["run folder"].status == "missing"
    assert "not seen by" in checks["run folder"].detail
    assert checks["clocks"].detail == "differ by 90.000 s"
    assert checks["open files"].detail == "at least 8, on n1"
    warned = {name for name, check in checks.items() if check.status == "warn"}
    assert warned == {"clocks", "open files", "/dev/shm free, GiB", "devices"}
    assert checks["python"].status == checks["commit"].status == "ok"


def test_a_wrong_sum_is_a_faulty_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRanks(World):
        def sum(self, values: Any) -> list[float]:
            return [float(value) for value in values]

        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    def sums(scale: float) -> Check:
        monkeypatch.setattr(node_checks.dist, "all_reduce", lambda values: values.mul_(scale))
        return node_checks._collectives(TwoRanks(0, 2, node_checks.torch.device("cpu"), None), 1)  # type: ignore[arg-type]

    assert sums(3.0).status == "ok"
    assert sums(3.5).status == "missing"


@pytest.mark.seconds
def test_the_table_is_printed_once(tmp_path: Path) -> None:
    words = ("doctor", "--nodes", "--folder", str(tmp_path / "runs"), "--megabytes", "1")
    outcome = run_command(*words, processes=2)
    assert outcome.value == 0
    assert outcome.out.count("all-reduce") == 1
    assert "2 on " in outcome.out
