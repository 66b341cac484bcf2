"""Environments for evaluation harnesses, on top of the one that runs this file: they see its packages, and never change
them.

lmms-eval and ms-vlmeval exclude each other (two versions of antlr4), and lmms-eval pins another wandb than ours.
"""

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Harness:
    """A harness, pinned: without its version pip goes back to older ones that lack half of it."""

    name: str
    requirement: str
    unwanted: tuple[str, ...] = ()
    """Packages that it asks for and works without."""


LMMS_EVAL = Harness("lmms-eval", "lmms-eval==0.7.3", unwanted=("torchvision",))
"""torchvision's wheel is a CUDA build, whose import fails beside a CPU torch and takes transformers with it."""
VLMEVALKIT = Harness("vlmevalkit", "ms-vlmeval==0.0.20")


def make_environment(harness: Harness, folder: Path) -> Path:
    """Install a harness, and this repository for editing, into a folder; returns its Python. Once made it stays."""
    python, installed = folder / "bin" / "python", folder / "installed"
    if installed.is_file() and installed.read_text() == harness.requirement:
        return python
    venv.create(folder, with_pip=False, clear=True)
    library = site_packages(folder)
    (library / "base.pth").write_text(f"{next(p for p in sys.path if p.endswith('site-packages'))}\n")
    version = torch.__version__.split("+")[0].split(".")
    # Whatever pip would rather take: another torch brings gigabytes of CUDA packages.
    pins = [f"torch=={torch.__version__}", f"torchvision==0.{int(version[1]) + 15}.{version[2]}"]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", harness.requirement, *pins], check=True)
    if harness.unwanted:
        subprocess.run([*pip, "uninstall", "--yes", *harness.unwanted], check=True)
    # Its entry points are what lmms-eval looks for.
    subprocess.run([*pip, "install", "--no-deps", "--editable", str(ROOT)], check=True)
    installed.write_text(harness.requirement)
    return python


def site_packages(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
