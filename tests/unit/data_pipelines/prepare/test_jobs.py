"""Jobs: counts that add up, markers, what is done again and what is not."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipelines.prepare.jobs import (
    JobOptions,
    RecordCounts,
    ShardTask,
    check_gpus_of,
    do_task,
    finished_counts,
    run_job,
    start_ray,
    unfinished,
    writing,
)
from emma_train.errors import RunError, UserError

CALLS = "calls.txt"


def copy(task: ShardTask, text: str) -> RecordCounts:
    """Writes a file and notes the call."""
    with open(task.marker.with_name(CALLS), "a") as calls:
        calls.write(f"{task.name}\n")
    if text == "broken":
        raise RunError("the shard is broken")
    if text == "refused":
        raise UserError("no such model")
    with writing(task.outputs[0]) as path:
        path.write_text(text)
    return RecordCounts(len(text), len(text) - 1, 1)


def tasks(folder: Path, texts: list[str], version: int = 1) -> list[ShardTask]:
    return [
        ShardTask(f"s{i}", folder / f"s{i}.done.json", (folder / f"s{i}.txt",), {"version": version}, (text,))
        for i, text in enumerate(texts)
    ]


def calls(folder: Path) -> list[str]:
    return (folder / CALLS).read_text().split()


def test_a_finished_task_is_not_run_again_and_its_counts_are_kept(tmp_path: Path) -> None:
    first = run_job("copy", tasks(tmp_path, ["abc", "de"]), copy, JobOptions())
    again = run_job("copy", tasks(tmp_path, ["abc", "de", "f"]), copy, JobOptions())
    assert calls(tmp_path) == ["s0", "s1", "s2"]
    assert first.counts == RecordCounts(5, 3, 2)
    assert again.counts == RecordCounts(6, 3, 3) and (again.finished_before, again.finished_now) == (2, 1)


@pytest.mark.parametrize("damage", ["marker", "output", "cut", "version"])
def test_a_task_is_run_again_if_anything_of_it_is_missing_or_changed(tmp_path: Path, damage: str) -> None:
    (task,) = tasks(tmp_path, ["abc"])
    do_task(task, copy)
    assert finished_counts(task) == RecordCounts(3, 2, 1)
    if damage == "marker":
        task.marker.write_text("{")
    elif damage == "output":
        task.outputs[0].unlink()
    elif damage == "cut":
        task.outputs[0].write_text("a")
    else:
        (task,) = tasks(tmp_path, ["abc"], version=2)
    assert unfinished([task]) == ([task], RecordCounts())


def test_a_failed_shard_does_not_stop_the_others(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"1 of 3 shards failed; s1: the shard is broken"):
        run_job("copy", tasks(tmp_path, ["abc", "broken", "de"]), copy, JobOptions())
    assert calls(tmp_path) == ["s0", "s1", "s2"]
    with pytest.raises(RunError):
        run_job("copy", tasks(tmp_path, ["abc", "broken", "de"]), copy, JobOptions())
    assert calls(tmp_path)[3:] == ["s1"]


def test_an_error_of_the_user_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        run_job("copy", tasks(tmp_path, ["refused", "abc"]), copy, JobOptions())
    assert calls(tmp_path) == ["s0"]


def test_an_interrupted_file_leaves_the_former_one_and_its_rest_is_removed_by_the_next_run(tmp_path: Path) -> None:
    (task,) = tasks(tmp_path, ["abc"])
    do_task(task, copy)
    with pytest.raises(KeyboardInterrupt), writing(task.outputs[0]) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert task.outputs[0].read_text() == "abc" and not list(tmp_path.glob("*.tmp"))
    leftover = tmp_path / "s0.txt.123-abc.tmp"
    leftover.write_text("half")
    run_job("copy", tasks(tmp_path, ["xyz"], version=2), copy, JobOptions())
    assert not leftover.exists() and task.outputs[0].read_text() == "xyz"


def test_counts_that_do_not_add_up_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        do_task(tasks(tmp_path, ["abc"])[0], lambda task, text: RecordCounts(3, 1, 1))


def test_markers_have_no_clock_in_them(tmp_path: Path) -> None:
    (task,) = tasks(tmp_path, ["abc"])
    do_task(task, copy)
    first = task.marker.read_bytes()
    task.marker.unlink()
    do_task(task, copy)
    assert task.marker.read_bytes() == first
    assert json.loads(first)["counts"] == {"read": 3, "kept": 2, "rejected": 1}


def test_gpus_that_this_machine_does_not_have_are_refused_and_awaited_of_a_cluster(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0, "GPU": 1.0})
    check_gpus_of(ray, JobOptions(gpus=1))
    with pytest.raises(UserError, match=r"--gpus 2: this machine has 1 for Ray; give fewer, or --address"):
        check_gpus_of(ray, JobOptions(gpus=2))
    check_gpus_of(ray, JobOptions(gpus=2, address="auto"))
    assert "tasks wait until a machine with GPUs joins" in caplog.text


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:x", "127.0.0.1:99999999"])
def test_a_cluster_that_does_not_answer_is_one_line(address: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens at it
        address = address.format(port=free.getsockname()[1])
        with pytest.raises(UserError, match=rf"--address {address}: nothing answers there \([^\n]+`ray start --head`"):
            start_ray(JobOptions(address=address))


def test_a_cluster_that_refuses_the_connection_is_one_line_that_names_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**arguments: object) -> None:
        raise ConnectionError("Failed to connect to\nRay cluster")  # as Ray does where the token is missing or wrong

    monkeypatch.setattr(ray, "init", refuse)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=r"Failed to connect to Ray cluster\); .* RAY_AUTH_MODE=token"):
            start_ray(JobOptions(address=address))
