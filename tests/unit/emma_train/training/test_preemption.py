"""Asked to stop: once gently, twice at once, and never later than promised, whatever the training thread is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from emma_train.training.preemption import EXIT_PREEMPTED, SIGNALS, StopRequest
from tests.helpers import ROOT

START = """
import ctypes, logging, os, signal, sys, time
from emma_train.training import preemption
logging.basicConfig()
preemption.SAME_REQUEST_S = 0.3
before = signal.getsignal(signal.SIGTERM)
with preemption.StopRequest() as stop:
    stop.within_s = float(sys.argv[2])
    if sys.argv[1] == "deaf":
        # What a thread does that waits for another rank: it runs no Python, so no handler of Python's either.
        print("ready", flush=True)
        while True:
            ctypes.CDLL(None).sleep(60)
    if sys.argv[1] == "worker":
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.3)  # fork itself takes a moment to let go of the trainer's pipe
        for number in preemption.SIGNALS:
            os.kill(worker, number)
        time.sleep(0.3)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        sys.exit(10 + stop.asked)
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    time.sleep(float(sys.argv[3]))
assert signal.getsignal(signal.SIGTERM) is before
sys.exit(20)
"""


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if words[0] != "worker":
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_no_end(number: signal.Signals) -> None:
    process = start("", "60", "0")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 20
    assert f"{number.name}: stopping after this step, with a checkpoint" in err


@pytest.mark.parametrize("how", ["", "deaf"])
def test_the_same_request_twice_is_one_and_a_later_one_ends_at_once(how: str) -> None:
    process = start(how, "60", "60")
    for _ in range(3):  # as torchrun and SLURM may both pass it on
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_PREEMPTED
    assert "SIGUSR1 again: stopping at once" in err


@pytest.mark.parametrize("how", ["", "deaf"])
def test_the_deadline_ends_what_does_not_end_itself(how: str) -> None:
    process = start(how, "0.5", "60")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_PREEMPTED
    assert "no checkpoint within 0.5 s (train.stop_within_s)" in err


def test_a_worker_that_is_told_to_end_does_not_stop_the_run() -> None:
    process = start("worker", "60", "0")
    process.communicate(timeout=20)
    assert process.returncode == 10


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.asked
    assert [signal.getsignal(number) for number in SIGNALS] == before
