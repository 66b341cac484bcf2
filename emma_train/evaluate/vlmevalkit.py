"""Starts VLMEvalKit with EMMA among its models, without a patch to it.

python -m emma_train.evaluate.vlmevalkit RUN --data MMBench_DEV_EN_V11 ChartQA_TEST --judge exact_matching

Options that --help does not list go to VLMEvalKit. Its model is `emma`, or `emma-no-experts`, so that both fit in one
work folder; a --config may name the class EmmaVLM with `path`, `ema`, `experts` and so on.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from emma_train.errors import UserError

log = logging.getLogger(__name__)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of VLMEvalKit."""
    parser = argparse.ArgumentParser(prog="python -m emma_train.evaluate.vlmevalkit", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="MODEL", help="run folder, checkpoint or export")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--no-ema", action="store_true", help="use the weights, not their average")
    parser.add_argument("--no-experts", action="store_true", help="send every image to the versatile encoder")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer (%(default)s)")
    parser.add_argument("--work-dir", default="outputs", help="where VLMEvalKit writes (%(default)s)")
    parser.add_argument("--mode", choices=("all", "infer", "eval"), default="all", help="VLMEvalKit's (%(default)s)")
    return parser.parse_known_args(arguments)


def register(options: argparse.Namespace) -> str:
    """Make the model known to VLMEvalKit, by its name and by its class; returns the name. Raises UserError."""
    try:
        import vlmeval.config
        import vlmeval.vlm
    except ModuleNotFoundError as error:
        raise UserError(
            f"VLMEvalKit needs {error.name}: pip install ms-vlmeval, in an environment of its own (docs/evaluation.md)"
        ) from None
    from emma_train.evaluate.vlmevalkit_model import EmmaVLM

    name = "emma-no-experts" if options.no_experts else "emma"
    vlmeval.config.supported_VLM[name] = partial(
        EmmaVLM,
        path=options.checkpoint,
        device=options.device,
        precision=options.precision,
        ema=not options.no_ema,
        experts=not options.no_experts,
        max_tokens=options.max_new_tokens,
    )
    vlmeval.vlm.EmmaVLM = EmmaVLM
    return name


def unscored(status_file: Path) -> list[str]:
    """Data sets of a run without a score, with VLMEvalKit's reason. It logs failures and ends with exit code 0."""
    try:
        datasets = json.loads(status_file.read_bytes())["datasets"]
    except (OSError, ValueError, KeyError):
        return [f"{status_file}: VLMEvalKit wrote no list of its data sets"]
    reasons = ("eval_error", "skip_reason", "infer_error", "error")
    return [
        f"{name}: {next((entry[key] for key in reasons if entry.get(key)), entry.get('status', 'no status'))}"
        for name, entry in datasets.items()
        if not entry.get("metrics")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run VLMEvalKit. Returns the exit code: 1 where a data set got no score, 2 where the model cannot be loaded."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, rest = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        name = register(options)
        from vlmeval import run

        by_config = [] if "--config" in rest else ["--model", name]
        sys.argv = ["vlmevalkit", *rest, "--work-dir", options.work_dir, "--mode", options.mode, *by_config]
        run.load_env()
        run.main()
    except UserError as error:
        log.error("%s", error)
        return 2
    if options.mode == "infer" or int(os.environ.get("RANK", 0)):
        return 0
    problems = unscored(Path(options.work_dir) / name / "status.json")
    for problem in problems:
        log.error("no score: %s", problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
