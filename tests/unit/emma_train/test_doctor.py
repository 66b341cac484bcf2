"""The doctor's verdicts, on this machine and on machines that lack something."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from emma_train import doctor as module
from emma_train.doctor import Check, _shared_memory, checks, doctor


def by_name(results: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in results}


def test_this_machine_can_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "gloo", "sdpa", "free", "cores"):
        assert word in printed


def test_extras_keep_their_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "_has", lambda name: name != "s3fs")
    monkeypatch.setattr(module.importlib, "import_module", lambda _: None)
    doctor()
    assert '-e ".[s3]"' in capsys.readouterr().out


def test_every_check_has_its_own_name_and_a_way_out() -> None:
    results = checks()
    assert len(by_name(results)) == len(results)
    for check in results:
        if check.essential and check.status == "missing":
            assert check.advice


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert by_name(checks())["torch"].status == "missing"
    assert doctor() == 1
    assert "This machine can't train yet: torch." in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a1+git1234"])
def test_a_new_torch_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert by_name(checks())["torch"].status == "ok"


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", lambda _: None)
    results = by_name(checks())
    assert (results["transformers"].status, results["transformers"].essential) == ("missing", True)
    assert (results["deepspeed"].status, results["deepspeed"].essential) == ("missing", False)
    assert '".[deepspeed]"' in results["deepspeed"].advice


def test_a_torchvision_that_does_not_match_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    torchvision = by_name(checks())["torchvision"]
    assert (torchvision.status, torchvision.essential) == ("missing", True)
    assert "nms" in torchvision.detail


def test_no_compiler_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    results = by_name(checks())
    assert results["C++ compiler"].status == "missing"
    assert results["torchrun"].status == "warn"
    assert doctor() == 0


def test_little_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 2**30))
    disk = by_name(checks(tmp_path / "runs"))[str(tmp_path / "runs")]
    assert (disk.status, disk.detail) == ("warn", "2 GiB free")


def test_a_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=64 * 2**20))
    memory = _shared_memory(tmp_path)
    assert (memory.status, memory.detail) == ("warn", "64 MiB")
    assert "--shm-size=16g" in memory.advice and "data.workers=0" in memory.advice
    assert _shared_memory(tmp_path / "none").status == "missing"


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((8, 9), "ok"), ((8, 6), "missing")])
def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str) -> None:
    card = type("Card", (), {"name": "Some H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    results = by_name(checks())
    assert results["cuda:1"].detail == "Some H100, 80 GiB"
    assert (results["fp8"].status, results["fp8"].essential) == (status, False)
