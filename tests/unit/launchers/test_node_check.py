"""What is said against a node, and that a check of it ends."""

import os
import time
from pathlib import Path

import pytest

from launchers import node_check
from launchers.node_check import NodeFacts, check_node, node_problems

WELL = ("0", "No", "No")


@pytest.mark.parametrize(
    ("facts", "problems"),
    [
        (NodeFacts(), []),
        (NodeFacts(free_gib=20.0, skew_s=-0.4, num_devices=8, device_values=[WELL] * 8), []),
        (NodeFacts(num_devices=9), []),
        (NodeFacts(device_values=[("[N/A]", "[N/A]", "[N/A]")] * 8), []),  # a card without ECC
        (NodeFacts(free_gib=0.25), ["0.25 GiB free in the run folder, fewer than 1"]),
        (NodeFacts(skew_s=7.04), ["its clock differs by 7.0 s from that of the run folder's disk"]),
        (NodeFacts(num_devices=7), ["7 GPUs of 8"]),
        (NodeFacts(device_values=[WELL, ("2", "No", "No")]), ["GPU 1 has 2 uncorrected ECC errors"]),
        (NodeFacts(device_values=[("0", "Yes", "No")]), ["GPU 0 waits for a reset to remap rows of its memory"]),
        (NodeFacts(device_values=[("0", "No", "Yes")]), ["GPU 0 could not remap rows of its memory"]),
        (NodeFacts(write_error="a", work_error="b"), ["a", "b"]),
    ],
)
def test_what_is_wrong_with_a_node(facts: NodeFacts, problems: list[str]) -> None:
    assert node_problems(facts, 8) == problems


def test_a_node_without_gpus_checks_the_disk_and_leaves_nothing(tmp_path: Path) -> None:
    assert check_node(tmp_path / "run", 0) == []
    assert list((tmp_path / "run" / "logs").iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert check_node(tmp_path / "run", 0) == [f"{tmp_path / 'run'} cannot be written (Not a directory)"]


def test_a_disk_that_hangs_is_named_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "_disk_facts", lambda run: time.sleep(60))
    started = time.monotonic()
    assert check_node(tmp_path, 0, limit_s=0.2) == [f"{tmp_path} does not answer in 0.2 s"]
    assert time.monotonic() - started < 5


def test_gpus_as_nvidia_smi_reports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that prints what nvidia-smi prints for a node of two GPUs, one of which has errors."""
    script = tmp_path / "nvidia-smi"
    listed = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)"
    script.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{listed}\\n' || printf '0, No, No\\n3, Yes, No\\n'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(node_check, "DEVICE_WORK", "raise RuntimeError('GPU 1 computes wrongly')")
    assert check_node(tmp_path / "run", 4) == [
        "2 GPUs of 4",
        "GPU 1 has 3 uncorrected ECC errors",
        "GPU 1 waits for a reset to remap rows of its memory",
        "RuntimeError: GPU 1 computes wrongly",
    ]


def test_the_work_on_gpus_is_python() -> None:
    compile(node_check.DEVICE_WORK, "work", "exec")
