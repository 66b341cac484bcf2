"""What the fuzz of options and of files (tests/fuzz_options.py, tests/fuzz_files.py) gives to the commands, and how a
command is tried. All paths are relative to the folder of the inputs.

ablation.yaml                    two arms of recipe.yaml
recipe.yaml                      two steps a checkpoint, of two sequences, with the model of tests/assets/e0297de
shards/, prompts/                two shards with cached latents; the held-out splits of a data set
selection/, data.yaml            all rows of the shards; a data recipe that selects them
runs/micro/                      a run of four steps with the checkpoints of steps 2 and 4 and frozen weights
export/                          its export
llm/, vision/, autoencoder/      Hugging Face folders of random models; the weights of llm are in several files
package/                         drawings of an npm package
formats/NAME/                    a source of every importer
image.png, file, folder/         an image to ask about; what is no folder and no file
"""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.emoji.concepts import TINY_CONCEPTS
from emma_train.config.load import load_yaml
from tests import more_public_formats, public_formats
from tests.benchmarks import geneval_data
from tests.distributed.spawn import run_ranks
from tests.drawings import write_package
from tests.helpers import ASSETS, ROOT
from tests.shards import every_task, png, write_shards

MEMORY = 4 << 30
TOKENIZER = str(ASSETS / "tokenizer")
AUTOENCODER = str(ASSETS / "autoencoder")
TIMEOUT_S = 600
"""Long, so that a busy machine makes no hang; a command takes a second."""
TRAINABLE = ["und_adapter", "gen_adapter", "decoder", "velocity_head"]
"""Without the vision encoder, so that a checkpoint has frozen weights."""


@dataclass(frozen=True)
class Command:
    """A command line; `emma_train` or `data_pipelines`."""

    argv: list[str]
    module: str = "emma_train"


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is None where it raised or did not end, which `err` says."""

    code: int | None
    out: str
    err: str

    @property
    def is_one_line(self) -> bool:
        """Whether the last line of stderr is a message of the command, and no other line is."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        messages = [line for line in lines if line.startswith(("error: ", "emma-train", "emma-data"))]
        return messages == lines[-1:] != []


CACHE_LATENTS = Command(
    ["cache-latents", "shards", "--autoencoder", AUTOENCODER, "--side", "64"], module="data_pipelines"
)
EXPORT = Command(["export", "runs/micro", "export"])


def _energon(folder: Path) -> None:
    members = [("a.jpg", public_formats.jpeg(0)), ("a.txt", b"a caption")]
    more_public_formats.write_energon(folder, "CaptioningSample", {"image": "png,jpg", "caption": "txt"}, members)


def _captioned_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(png(0))
    (folder / "0.txt").write_text("a caption")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "llava-pretrain": public_formats.write_llava_pretrain,
    "llava-json": public_formats.write_llava_pretrain,
    "llava-onevision": public_formats.write_onevision,
    "finevision": lambda folder: public_formats.write_finevision(folder, "ai2d"),
    "omniedit": public_formats.write_omniedit,
    "img2dataset": public_formats.write_img2dataset,
    "x2i2": more_public_formats.write_x2i2,
    "bagel": more_public_formats.write_bagel,
    "energon": _energon,
    "hf-parquet": more_public_formats.write_any_parquet,
    "folder": _captioned_images,
    "tuxpaint-stamps": more_public_formats.write_stamps,
    "openclipart": more_public_formats.write_clip_art,
}
"""Writes a small source of each importer."""


def make_inputs(folder: Path) -> Path:
    """Write all inputs to a folder, which is returned."""
    from tests import public  # imports transformers, for seconds

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_values()))
    arms = {"one": {}, "other": {"set": {"model.und_attention": "full"}}}
    (folder / "ablation.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "arms": arms}))
    (folder / "image.png").write_bytes(png(0, 64))
    (folder / "file").write_text("a file\n")
    (folder / "folder").mkdir()
    write_package(folder / "package", {name: group for group, names in TINY_CONCEPTS.items() for name in names})
    for name, write in SOURCES.items():
        write(folder / "formats" / name)
    write_shards(folder / "shards", every_task(6), per_shard=9)
    for split in ("train", "heldout_drawings", "heldout_concepts"):
        write_shards(folder / "prompts" / split, every_task(1))
    geneval_data(folder / "geneval", 1)
    public.llm(folder / "llm", num_hidden_layers=2, shard="50KB")
    public.vision(folder / "vision")
    public.autoencoder(folder / "autoencoder")
    (folder / "data.yaml").write_text("variables: {}\nout: data\nsteps:\n  - select {out} --from shards\n")
    select = Command(["select", "selection", "--from", "shards"], module="data_pipelines")
    for command in (CACHE_LATENTS, select, Command(["train", "recipe.yaml"]), EXPORT):
        ended = try_command(command, folder)
        assert ended.code == 0, ended.err
    return folder


def recipe_values() -> dict[str, Any]:
    """The micro recipe for four steps on the shards of the inputs."""
    values = load_yaml(ROOT / "tests" / "assets" / "e0297de" / "recipe.yaml")
    values["stage"]["trainable"] = TRAINABLE
    values["model"]["autoencoder"]["path"] = AUTOENCODER
    values["data"] |= {"tokenizer": TOKENIZER, "sources": [{"path": "shards"}], "slots": 2, "samples_per_step": 6}
    values["schedule"]["kind"] = "constant"  # a cosine would follow train.steps, which a resume changes
    values["train"] |= {"steps": 4, "save_every": 2, "keep": 3}
    return values


def try_command(command: Command, folder: Path, timeout_s: float = TIMEOUT_S) -> Ended:
    """Run a command in a process of its own, with its working directory in `folder` and 4 GiB of addresses."""
    try:
        (outcome,) = run_ranks(1, _limited, command.argv, str(folder), command.module, timeout_s=timeout_s)
    except AssertionError as error:
        return Ended(None, "", str(error))
    return Ended(outcome.value, outcome.out, outcome.err)


def problem_of(ended: Ended) -> str:
    """What is wrong with the end of a command: a traceback, a hang, or more than one line; else an empty text."""
    if ended.code is None or "Traceback" in ended.err or ended.code not in (0, 1, 2):
        return f"exit code {ended.code}: {ended.err[-3000:]}"
    if ended.code == 2 and not ended.is_one_line:
        return f"not one line: {ended.err[-3000:]}"
    return ""


def _limited(argv: list[str], folder: str, module: str) -> int:
    from data_pipelines import cli as data_cli
    from emma_train import cli

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        return (cli if module == "emma_train" else data_cli).main(argv)
    except SystemExit as error:  # argparse
        return int(error.code or 0)
