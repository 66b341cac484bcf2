"""Damage to every file that the commands read: shards, checkpoints, exports and Hugging Face folders.

file_cases(inputs)         every file x every kind of damage, with the commands that read the file
Trial(inputs).run(...)     what came of a case and a command

    python -m tests.fuzz_files [PART OF A LINE ...]      try all, or the lines that contain a part: "export/meta.json"

A command must refuse a damaged file in a line that names it, or say that it is damaged (`check`, `inspect --verify`),
or do what it does without the damage: the same bytes in what it writes and prints.
"""

import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import safe_open

from tests.fuzz_inputs import AUTOENCODER, TOKENIZER, Command, Ended, make_inputs, problem_of, try_command
from tests.runs import SAME_EVERYWHERE

log = logging.getLogger(__name__)
OTHER_JSON = ("[]", "{}")
FLIPS = (0.1, 0.5)
"""Where in a file a bit is flipped, as parts of its length."""
ASK = ("--task", "i2t", "--prompt", "What?", "--image", "image.png", "--temperature", "0", "--max-tokens", "4")
DRAW = ("--task", "t2i", "--prompt", "a cat", "--steps", "1", "--size", "32", "32")
TRAIN = ("train", "recipe.yaml")
NEXT = (*TRAIN, "run.name=next", "stage.name=stage2", "train.steps=1")
PARTS = ("--llm", "llm", "--vision", "vision", "--autoencoder", "autoencoder", "model.time_features=16")


@dataclass(frozen=True)
class Reader:
    """A command that reads the files of a folder, and what it writes."""

    argv: tuple[str, ...]
    writes: str = ""
    """File or folder whose content is compared; without it, what the command prints."""
    module: str = "emma_train"
    files: str = "**/*"
    """Which files of the folder are compared."""


READERS: dict[str, dict[str, Reader]] = {
    "shards": {
        "train": Reader((*TRAIN, "run.name=new", "train.steps=2"), "runs/new"),
        "check": Reader(("check", "shards", "--workers", "1"), module="data_pipelines"),
        "stats": Reader(("stats", "shards"), module="data_pipelines"),
        "cache-latents": Reader(
            ("cache-latents", "shards", "--autoencoder", AUTOENCODER, "--side", "64"),
            "shards",
            "data_pipelines",
            "*.latents.safetensors",
        ),
        "index": Reader(
            ("index", "shards", "--tokenizer", TOKENIZER, "--workers", "1"), "shards", "data_pipelines", "*.idx.parquet"
        ),
        "plan": Reader(("plan", "recipe.yaml", "--gpus", "2")),
    },
    "runs/micro": {
        "resume": Reader((*TRAIN, "train.steps=6"), "runs/micro"),
        "init": Reader((*NEXT, "init.from=runs/micro"), "runs/next"),
        "inspect": Reader(("inspect", "runs/micro", "--json")),
        "verify": Reader(("inspect", "runs/micro", "--verify")),
        "copy": Reader(("inspect", "runs/micro", "--self-contained", "copy"), "copy"),
        "export": Reader(("export", "runs/micro", "out"), "out"),
        "generate": Reader(("generate", "runs/micro", "--device", "cpu", *ASK)),
        "report": Reader(("report", "runs/micro"), "runs/micro/report.html"),
    },
    "export": {
        "init": Reader((*NEXT, "init.from=export"), "runs/next"),
        "export": Reader(("export", "export", "out"), "out"),
        "ask": Reader(("generate", "export", "--device", "cpu", *ASK)),
        "draw": Reader(("generate", "export", "--device", "cpu", "--out", "drawn", *DRAW), "drawn"),
    },
    "llm": {"import": Reader(("import", "out", *PARTS), "out")},
    "vision": {"import": Reader(("import", "out", *PARTS), "out")},
    "autoencoder": {"import": Reader(("import", "out", *PARTS), "out")},
}
"""By folder of the inputs: the commands that read it."""


NO_CHECKSUMS = ("llm", "vision", "autoencoder")
"""Folders in a format of others, in which a flipped bit of a weight makes another weight that is as valid."""

EDITABLE = ("generation.json",)
"""Files that people may change, in which a flipped bit may make another value that is as valid."""


@dataclass(frozen=True)
class Case:
    """A file of the inputs, and what happens to it."""

    folder: str
    file: str
    """Below the folder."""
    damage: str
    """The name of a kind of damage, with a number where there are several of the kind."""
    other: str = ""
    """The file that it is swapped with."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.file} {self.damage}"


def file_cases(inputs: Path) -> list[Case]:
    """Every file of every folder with every kind of damage."""
    return [case for folder in READERS for case in _cases(folder, inputs / folder)]


def _cases(name: str, folder: Path) -> Iterator[Case]:
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        size = (folder / file).stat().st_size
        yield Case(name, str(file), "gone")
        if size:
            yield Case(name, str(file), "empty")
            yield Case(name, str(file), "cut")
            yield from (Case(name, str(file), f"flipped at {part}") for part in FLIPS)
        same_kind = [other for other in files if other.suffix == file.suffix and other != file]
        others = same_kind or [other for other in files if other != file]
        if others:
            yield Case(name, str(file), "swapped", str(others[number % len(others)]))
        if file.suffix == ".json":
            yield from (Case(name, str(file), f"other JSON: {text}") for text in OTHER_JSON)


def damage(case: Case, inputs: Path) -> None:
    """Do to the file what the case says."""
    path = inputs / case.folder / case.file
    content = path.read_bytes()
    if case.damage == "gone":
        path.unlink()
    elif case.damage == "empty":
        path.write_bytes(b"")
    elif case.damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif case.damage == "swapped":
        other = path.parents[len(Path(case.file).parts) - 1] / case.other
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif case.damage.startswith("flipped"):
        position = int(len(content) * float(case.damage.rpartition(" ")[2]))
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
    else:
        path.write_text(case.damage.removeprefix("other JSON: "))


@dataclass(frozen=True)
class Run:
    """How a reader ended, and what it wrote."""

    ended: Ended
    result: Any
    """Equal for equal results."""


def run_reader(reader: Reader, inputs: Path, change: Callable[[Path], None]) -> Run:
    """Run a command in a copy of the inputs after a change of them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "inputs"
        shutil.copytree(inputs, folder, copy_function=shutil.copyfile)
        change(folder)
        ended = try_command(Command(list(reader.argv), reader.module), folder)
        text = f"{ended.out}".replace(temporary, "")
        written = folder / reader.writes
        return Run(ended, _content(written, reader.files) if reader.writes and written.exists() else text)


def _content(path: Path, files: str) -> dict[str, Any]:
    """What a command wrote, without clocks: metrics of the last steps, and hashes of the last checkpoint's shards, of
    tensors, images and JSON."""
    if (path / "metrics.jsonl").is_file():
        return _run_content(path)
    if path.is_file():
        return {"": path.stat().st_size > 0}
    return {str(file.relative_to(path)): _digest(file) for file in sorted(path.glob(files)) if file.is_file()}


def _run_content(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = sorted((run / "checkpoints").glob("step-*[0-9]"))
    shards = {str(file.relative_to(run)): _digest(file) for step in steps[-1:] for file in step.rglob("*.distcp")}
    last = lines[-1] if lines else {}  # a run that was refused may have an empty file
    return {"last": {key: last.get(key) for key in SAME_EVERYWHERE}, **shards}


def _digest(file: Path) -> str:
    """A hash of a file's content, without what tells when and from where it was written."""
    content = file.read_bytes()
    if file.name == "meta.json":
        values = json.loads(content)
        kept = {k: v for k, v in values.items() if k not in ("time", "checksum", "files", "sources", "run")}
        content = json.dumps(kept).encode()
    if file.name == ".metadata":
        return ""
    if file.suffix == ".safetensors":  # the order of its metadata is another in every process
        with safe_open(file, framework="pt") as tensors:
            values = {name: tensors.get_tensor(name).float().numpy().tobytes() for name in sorted(tensors.keys())}
            content = repr((sorted((tensors.metadata() or {}).items()), values)).encode()
    return hashlib.sha256(content).hexdigest()


def judge(case: Case, run: Run, expected: Run) -> str:
    """`refused`, `reported`, `same` or `unknowable`, or what went wrong: `silent`, `unnamed` or `raised` and what the
    command said."""
    ended = run.ended
    names = {Path(file).name for file in (case.file, case.other) if file} | {case.file}
    names |= {str(parent) for file in (case.file, case.other) for parent in Path(file).parents if parent.name}
    said = next((name for name in sorted(names) if name in ended.err + ended.out), None)
    if problem := problem_of(ended):
        return f"raised: {problem}"
    if ended.code in (1, 2):
        last = ended.err + ended.out
        return ("reported" if ended.code == 1 else "refused") if said else f"unnamed: {last[-600:]}"
    if run.result == expected.result:
        return "same, and said" if said and said not in expected.ended.err + expected.ended.out else "same"
    if case.damage.startswith("flipped") and (case.folder in NO_CHECKSUMS or case.file in EDITABLE):
        return "unknowable"
    return f"{'other result, and said' if said else 'silent'}: {ended.err[-600:]}"


class Trial:
    """The inputs and, once they are needed, the results of the commands without damage."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self._expected: dict[tuple[str, str], Run] = {}
        self._lock = Lock()

    def run(self, case: Case, name: str) -> str:
        """What came of a command after the damage of a case."""
        reader = READERS[case.folder][name]
        run = run_reader(reader, self.inputs, lambda folder: damage(case, folder))
        result = judge(case, run, self._undamaged(case.folder, name) if run.ended.code == 0 else run)
        takes_tars = name == "index" and case.file.endswith(".tar")
        return "unknowable" if takes_tars and case.damage == "swapped" and result.startswith("silent") else result

    def _undamaged(self, folder: str, name: str) -> Run:
        with self._lock:
            if (folder, name) not in self._expected:
                self._expected[folder, name] = run_reader(READERS[folder][name], self.inputs, lambda _: None)
            return self._expected[folder, name]


def try_all(inputs: Path, parts: Sequence[str]) -> dict[str, str]:
    """What came of every case and command whose text contains one of `parts` (none: of all); two at a time."""
    every = [(case, name) for case in file_cases(inputs) for name in READERS[case.folder]]
    chosen = [(case, name) for case, name in every if not parts or any(part in f"{case}, {name}" for part in parts)]
    trial, results = Trial(inputs), {}
    with ThreadPoolExecutor(2) as pool:
        for (case, name), result in zip(chosen, pool.map(lambda item: trial.run(*item), chosen), strict=True):
            results[f"{case}, {name}"] = result
            log.info("%s, %s: %s", case, name, result)
    return results


def main(parts: Sequence[str]) -> int:
    """Print results and counts. Returns 1 if something went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        inputs = make_inputs(Path(temporary) / "inputs")
        start = time.monotonic()
        results = try_all(inputs, parts)
    counts = Counter(result.partition(":")[0] for result in results.values())
    sys.stdout.write(f"{len(results)} cases: {dict(counts)}, {time.monotonic() - start:.0f} s\n")
    return 1 if counts.keys() & {"raised", "silent", "unnamed"} else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
