"""Speed and memory of whole optimizer steps at the width of EMMA-4B, on one card: Stage 1, the other stages beside it.

    python tests/gpu/step.py [--out DIR] [--minutes 8.5] [--layers N] [--only NAME ...]
    python tests/gpu/step.py --device cpu --tiny --out DIR      proves the script on a machine without a GPU

A stage as its recipe has it (FSDP2 on one rank, bf16, AdamW, averages, clipping, latents cached), with random weights,
as many decoder layers as fit in Stage 1, and packs of random images and text in the recipe's shape. `from-shards` is
`emma-train train` itself, with loader workers that read shards. Each setting runs in a process
of its own, so one that fails, or that is out of time, leaves the others alone. After each setting the results
are written as JSON and as Markdown, and the kernels of one step as profile-SETTING.txt, to DIR (or $OUT, or runs/gpu).

Needs torch >= 2.11 and the packages of tests/gpu/wheels.txt, nothing else.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from emma_train.training.environment import commit  # noqa: E402
from tests.gpu.padded import measure_padded  # noqa: E402
from tests.gpu.stage_packs import SHAPES  # noqa: E402
from tests.gpu.step_setting import Scale, Setting, measure  # noqa: E402

FULL_LAYERS = 36
ONE_CARD = ("engine.reshard_after_forward=false", "engine.reduce_every_micro_step=false")
"""One card alone shards nothing: it gains nothing by gathering weights twice a micro-step and adding up shards."""
SETTINGS = (
    Setting("eager", compile=False, profile=True),
    Setting("compile", profile=True),
    Setting("one-card", changes=ONE_CARD, profile=True),
    Setting("one-card-half-depth", changes=ONE_CARD, depth=0.5),
    Setting("one-card-16-pairs", changes=ONE_CARD, times=2, depth=0.75),
    Setting("one-card-deterministic", changes=ONE_CARD, deterministic=True),
    Setting("fp8-tensorwise", changes=(*ONE_CARD, "engine.fp8=tensorwise"), profile=True),
    Setting("fp8-rowwise", changes=(*ONE_CARD, "engine.fp8=rowwise"), profile=True),
    Setting("tokenwise", changes=ONE_CARD, times=0.5, tokenwise=True),
    Setting("tokenwise-flex", changes=ONE_CARD, times=0.5, tokenwise=True, backend="flex"),
    Setting("padded", compile=False, padded=True, profile=True),
    Setting("from-shards", changes=ONE_CARD, from_shards=True),
    *(Setting(stage, stage=stage, changes=ONE_CARD) for stage in SHAPES if stage != "stage1"),
    Setting("eager-sdpa", compile=False, backend="sdpa"),
    Setting("eager-flex", compile=False, backend="flex"),
    Setting("compile-flex", backend="flex"),
)
"""In the order of their worth, should the time run out."""
LONGEST_S = 270
"""Seconds that one setting may take; compiling takes most of them."""
COLUMNS = {
    "name": "setting",
    "num_layers": "layers",
    "tokens_per_micro_step": "tokens a micro-step",
    "step_s": "step s",
    "first_step_s": "first step s",
    "optimizer_s": "of it optimizer s",
    "samples_per_s": "samples/s",
    "tokens_per_s": "tokens/s",
    "tflops_per_s": "TFLOP/s",
    "mfu": "MFU of the bf16 peak",
    "first_loss": "first loss",
    "last_loss": "last loss",
    "peak_gib": "peak GiB",
    "planned_gib": "planned GiB",
    "reserved_gib": "reserved GiB",
    "graphs": "graphs",
    "graphs_after_first_step": "graphs later",
    "waits": "waits for the device",
    "num_kernels": "kernels",
    "data_wait": "data wait",
}


def main() -> int:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    num_layers = arguments.layers or (4 if arguments.tiny else layers_that_fit(arguments.device))
    micro_steps, num_steps = (2, 2) if arguments.tiny else (4, 8)
    scale = Scale(arguments.device, arguments.tiny, num_layers, micro_steps, num_steps)
    if arguments.result:
        setting = next(setting for setting in SETTINGS if setting.name == arguments.only[0])
        values = measured(setting, scale, arguments.out, 60 * arguments.minutes)
        arguments.result.write_text(json.dumps(values))
        return 0
    settings = [setting for setting in SETTINGS if not arguments.only or setting.name in arguments.only]
    results, deadline = [], time.monotonic() + 60 * arguments.minutes
    for setting in settings:
        results.append(run_setting(setting, scale, arguments.out, deadline))
        write(arguments.out / arguments.table, machine(scale), results)
    table = (arguments.out / arguments.table).with_suffix(".md").read_text()
    logging.info("step: results in %s\n%s", arguments.out, table)
    return 0 if any("step_s" in result for result in results) else 1


def measured(setting: Setting, scale: Scale, out: Path, longest_s: float) -> dict[str, Any]:
    """What a setting measures, in this process, which is killed after `longest_s`."""
    if setting.from_shards:
        from tests.gpu.from_shards import measure_from_shards  # needs packages that the others do without

        return measure_from_shards(setting, scale, out, longest_s)
    return (measure_padded if setting.padded else measure)(setting, scale, out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all settings; the rest is left out")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers, even; as many as fit where not given")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[s.name for s in SETTINGS])
    parser.add_argument("--table", default="step", help="name of the files with the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # measure one setting in this process
    return parser.parse_args()


def layers_that_fit(device: str) -> int:
    """Decoder layers with which a step fits the card, without compiling and without recomputing activations.

    A layer has 195 M parameters of 20 bytes (weight, gradient, two moments, average) and keeps 1.1 GB of activations of
    6.1 k tokens; embedding, adapters and vision encoder take 17 GB, the activations of the vision encoder 8, gathered
    weights, the head's gradient and buffers 8. A tenth of the card stays free.
    """
    if device == "cpu":
        return 2
    total = torch.cuda.get_device_properties(0).total_memory
    return max(2, min(16, int((0.9 * total - 33e9) / 5.0e9) // 2 * 2))


def run_setting(setting: Setting, scale: Scale, out: Path, deadline: float) -> dict[str, Any]:
    """Measure a setting in a process of its own; what it measured, or its error."""
    seconds = min(deadline - time.monotonic(), LONGEST_S if scale.device == "cuda" else 3600)
    if seconds < 20:
        return {**asdict(setting), "error": "no time left"}
    logging.info("step: %s", setting.name)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--only", setting.name, "--result", str(result), "--out", str(out)]
        # One rank talks to nobody, but gloo and NCCL look for a network all the same.
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        command += ["--device", scale.device, "--layers", str(scale.num_layers), *(["--tiny"] if scale.tiny else [])]
        command += ["--minutes", str(seconds / 60)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env={**loopback, **os.environ}
            )
        except subprocess.TimeoutExpired as error:
            return {**asdict(setting), "error": f"no end after {seconds:.0f} s", "output": last_lines(error.stderr)}
        if not result.exists():  # a process may fail at its very end, when all is measured
            (out / f"error-{setting.name}.txt").write_text(done.stdout + done.stderr)
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {**asdict(setting), "error": lines[-1], "output": last_lines(done.stderr)}
        return json.loads(result.read_text())


def last_lines(text: str | bytes | None) -> str:
    """The end of what a process wrote."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return "\n".join((text or "").strip().splitlines()[-30:])


def machine(scale: Scale) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    cuda = scale.device == "cuda"
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tiny": scale.tiny,
    }


def write(path: Path, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results so far, as JSON and as Markdown; `path` has no suffix yet."""
    full = at_full_depth(results)
    path.with_suffix(".json").write_text(
        json.dumps({**facts, "settings": results, "full_depth": full}, indent=1) + "\n"
    )
    lines = ["# Optimizer steps", "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
    for result in results:
        values = {**result, "waits": sum(result.get("waits_for_device", {}).values())}
        if "error" in result:
            lines.append(f"| {result['name']} | {result['error'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2))
        else:
            lines.append(f"| {' | '.join(cell(values.get(key)) for key in COLUMNS)} |")
    lines += [*over_baselines(results), *over_stage1(results)]
    if full:
        lines += [
            "",
            f"At {FULL_LAYERS} layers, from two depths: {', '.join(f'{k} {cell(v)}' for k, v in full.items())}",
        ]
    for result in results:
        if kernels := result.get("kernels"):
            by_size = ", ".join(f"heads of {head_dim}: {kernel}" for head_dim, kernel in kernels.items())
            lines += ["", f"{result['name']}, attention with {by_size}"]
        if parts := result.get("ms_of_part"):
            lines += ["", f"{result['name']}, ms of a step: {', '.join(f'{k} {cell(v)}' for k, v in parts.items())}"]
        if waits := result.get("waits_for_device"):
            lines += ["", f"{result['name']}, waits: {', '.join(f'{line} x {n}' for line, n in waits.items())}"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def over_baselines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each baseline that was measured: samples a second of EMMA's packs over its own."""
    speeds = {result["name"]: result["samples_per_s"] for result in results if "step_s" in result}
    baselines = [name for name in ("padded", "tokenwise", "tokenwise-flex") if name in speeds and "one-card" in speeds]
    return [line for b in baselines for line in ("", f"one-card over {b}: {speeds['one-card'] / speeds[b]:.2f}")]


def over_stage1(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each other stage: its peak of memory over that of Stage 1 with the same settings."""
    peaks = {result["name"]: result["peak_gib"] for result in results if result.get("peak_gib")}
    stages = [stage for stage in SHAPES if stage in peaks and "one-card" in peaks]
    return [line for s in stages for line in ("", f"memory of {s} over one-card's: {peaks[s] / peaks['one-card']:.2f}")]


def at_full_depth(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Time and MFU of a micro-step with all layers of EMMA-4B, by a straight line through two depths. It leaves out
    what several cards exchange, and the optimizer, which a step has once."""
    by_name = {result["name"]: result for result in results if "step_s" in result}
    if not {"one-card", "one-card-half-depth"} <= by_name.keys():
        return {}
    deep, shallow = by_name["one-card"], by_name["one-card-half-depth"]
    if (layers := deep["num_layers"] - shallow["num_layers"]) <= 0:
        return {}

    def line(one: float, other: float) -> float:
        return one + (one - other) / layers * (FULL_LAYERS - deep["num_layers"])

    seconds = [(r["step_s"] - r["optimizer_s"]) / r["micro_steps"] for r in (deep, shallow)]
    flops = [r["flops"] / r["micro_steps"] for r in (deep, shallow)]
    full_s, full_flops = line(*seconds), line(*flops)
    peak = deep["tflops_per_s"] * 1e12 / deep["mfu"] if deep["mfu"] else None
    return {
        "micro_step_s": full_s,
        "tokens_per_s": deep["tokens_per_micro_step"] / full_s,
        "mfu": full_flops / full_s / peak if peak else None,
        "layer_s": (seconds[0] - seconds[1]) / layers,
    }


def cell(value: Any) -> str:
    """A value as a table shows it: three significant digits."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
