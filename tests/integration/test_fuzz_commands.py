"""A sample of wrong options (tests/fuzz_options.py) and of damaged files (tests/fuzz_files.py, docs/reliability.md)."""

from pathlib import Path

import pytest

from tests.fuzz_files import Trial, file_cases
from tests.fuzz_inputs import make_inputs
from tests.fuzz_options import LEGAL, RIGHT, commands, option_cases, try_case

EVERY = 211
"""Of the cases of options, one in so many is a sample."""
STEP = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("fuzz") / "inputs")


@pytest.fixture(scope="module")
def trial(inputs: Path) -> Trial:
    return Trial(inputs)


def test_every_command_has_legal_values() -> None:
    assert LEGAL.keys() == {name for name, _ in commands()}


def test_a_sample_of_the_wrong_options_is_refused_or_done(inputs: Path) -> None:
    results = {str(case): try_case(case, inputs) for case in option_cases()[::EVERY]}
    assert {name: result for name, result in results.items() if result not in RIGHT} == {}
    assert "refused" in results.values()


@pytest.mark.parametrize(
    ("folder", "file", "kind", "command", "outcome"),
    [
        ("shards", "shard-000000.idx.parquet", "flipped at 0.5", "check", "reported"),
        ("shards", "shard-000000.idx.parquet", "flipped at 0.1", "index", "same, and said"),
        ("shards", "shard-000000.square-64.latents.safetensors", "flipped at 0.5", "cache-latents", "same, and said"),
        ("shards", "manifest.json", "cut", "plan", "refused"),
        ("runs/micro", f"{STEP}/meta.json", "empty", "generate", "other result, and said"),
        ("runs/micro", f"{STEP}/weights/__0_0.distcp", "flipped at 0.5", "verify", "reported"),
        ("export", "model.safetensors", "flipped at 0.5", "ask", "refused"),
        ("export", "meta.json", "other JSON: []", "ask", "refused"),
        ("llm", "model-00001-of-00003.safetensors", "gone", "import", "refused"),
        ("autoencoder", "config.json", "other JSON: {}", "import", "refused"),
    ],
)
def test_a_sample_of_the_damaged_files_is_noticed(
    trial: Trial, folder: str, file: str, kind: str, command: str, outcome: str
) -> None:
    (case,) = [case for case in file_cases(trial.inputs) if str(case) == f"{folder}/{file} {kind}"]
    assert trial.run(case, command).partition(":")[0] == outcome
