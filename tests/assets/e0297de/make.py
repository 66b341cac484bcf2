"""Makes this fixture, and what e0297de does with it. Needs that commit's code: see README.md.

python make.py files          micro.tar.xz and export/, from recipe.yaml
python make.py expected OUT   OUT (a JSON file) and OUT's folder/{t2i,it2i}.png, from the files

Both run in the root of a checkout, which the recipe's relative paths need.
"""

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
RECIPE, RUN, EXPORT, IMAGE = HERE / "recipe.yaml", HERE / "micro.tar.xz", HERE / "export", HERE / "image.webp"
AUTOENCODER, TOKENIZER = Path("recipes/tiny/assets/autoencoder"), Path("recipes/tiny/assets/tokenizer/tokenizer.json")
STOP = "import sys; from tests.distributed.ranks import stopped_command as run; sys.exit(run(sys.argv[1:], 4))"
MACHINE = {"command": "emma-train train recipe.yaml", "host": "host"}
"""What environment.json says of the machine, and says no longer."""
CLOCKS = ("tokens_per_s", "memory_gib", "step_s", "data/wait_s", "checkpoint/stall_s", "time_unix")
IMAGE_OPTIONS = ["--size", "64", "64", "--steps", "2", "--seed", "0"]
ASKED: dict[str, list[str]] = {
    "i2t": ["--prompt", "What is this?", "--image", str(IMAGE), "--temperature", "0", "--max-tokens", "8"],
    "t2i": ["--prompt", "a yellow background with a flat basketball at the top", *IMAGE_OPTIONS],
    "it2i": ["--prompt", "make the background pink", "--image", str(IMAGE), *IMAGE_OPTIONS],
}
STAGE2 = ["stage.name=stage2", "run.name=stage2", "train.steps=3"]


def main() -> None:
    if sys.argv[1] == "files":
        files()
    else:
        out = Path(sys.argv[2])
        with tempfile.TemporaryDirectory() as scratch:
            out.write_text(json.dumps(expected(Path(scratch), out.parent), indent=1) + "\n")


def files() -> None:
    """The run stopped in step 4, in runs/micro as its recipe says, and its export."""
    run = Path("runs/micro")
    assert not run.exists(), run
    python("-c", STOP, "train", str(RECIPE), code=75)
    environment = json.loads((run / "environment.json").read_text()) | MACHINE
    (run / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    (run / "lock").unlink()
    (run / "logs").rmdir()
    with tarfile.open(RUN, "w:xz", preset=9) as archive:
        for path in [run, *sorted(run.rglob("*"))]:
            archive.add(path, str(path.relative_to(run.parent)), recursive=False, filter=plain)
    shutil.rmtree(EXPORT, ignore_errors=True)
    emma("export", str(run), str(EXPORT))
    # unpack_export() puts back what is left out; nothing that the repository does not have.
    assert filecmp.cmp(EXPORT / "tokenizer.json", TOKENIZER, shallow=False)
    assert not any(filecmp.cmpfiles(EXPORT / "autoencoder", AUTOENCODER, os.listdir(AUTOENCODER), shallow=False)[1:])
    shutil.rmtree(EXPORT / "autoencoder")
    (EXPORT / "tokenizer.json").unlink()
    # Stopped and resumed is the same as never stopped.
    emma("train", str(RECIPE))
    emma("train", str(RECIPE), "run.name=whole")
    assert metrics(Path("runs/whole")) == metrics(run)


def expected(scratch: Path, images: Path) -> dict[str, Any]:
    """What the code makes of the files, in folders below `scratch`; the images that it draws go to `images`."""
    unpack(scratch)
    run, root = scratch / "micro", f"run.root={scratch}"
    exports: dict[str, Any] = {}
    for name, *words in (("export",), ("export_no_ema", "--no-ema")):
        emma("export", str(run), str(scratch / name), *words)
        exports[name] = tensors(scratch / name / "model.safetensors")
    generated = {task: ask(task, run, images / f"{task}.png") for task in ASKED}
    emma("train", str(RECIPE), root, "init.from=" + str(run), *STAGE2)
    handed = metrics(scratch / "stage2")
    emma("train", str(RECIPE), root)
    resumed = metrics(run)

    # What is stored as an export must be what the run folder exports, and do the same.
    stored = scratch / "stored"
    unpack_export(stored)
    assert tensors(stored / "model.safetensors") == exports["export"]
    for task, answer in generated.items():
        assert ask(task, stored, scratch / f"{task}.png") == answer, task
    emma("train", str(RECIPE), root, f"init.from={stored}", *STAGE2, "run.name=stage2-of-export")
    assert metrics(scratch / "stage2-of-export") == handed
    resumed = [line for line in resumed if line["step"] > 4]
    return {"resumed": resumed, "stage2": handed, "generate": generated} | exports


def unpack(folder: Path) -> None:
    """The run folder as folder/micro."""
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")


def unpack_export(folder: Path) -> None:
    """The export with what it lacks here."""
    shutil.copytree(EXPORT, folder)
    shutil.copytree(AUTOENCODER, folder / "autoencoder")
    shutil.copy(TOKENIZER, folder)


def ask(task: str, model: Path, file: Path) -> Any:
    """The answer, or shape and digest of the image, which is kept as `file`."""
    with tempfile.TemporaryDirectory() as made:
        out = emma("generate", str(model), "--task", task, "--device", "cpu", "--out", made, *ASKED[task])
        if task == "i2t":
            return out.removesuffix("\n")
        shutil.copy(f"{made}/{task}-0000.png", file)
    with Image.open(file) as image:
        data = np.asarray(image)
    return {"shape": list(data.shape), "sha256": hashlib.sha256(data.tobytes()).hexdigest()}


def tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and digest of every tensor of a safetensors file."""
    digests = {}
    with safe_open(path, "numpy") as stored:
        for name in sorted(stored.keys()):
            value = stored.get_tensor(name)
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            digests[name] = {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": digest}
    return digests


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without clocks and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def emma(*words: str) -> str:
    return python("-m", "emma_train", *words)


def python(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "."), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stderr}"
    return done.stdout


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


if __name__ == "__main__":
    main()
