"""Options of the commands that run a model (generate, evaluate)."""

import argparse


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint (or a URL of one) or export")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the weights; auto: bf16 on a GPU, fp32 on CPUs",
    )
    parser.add_argument("--no-ema", action="store_true", help="use the weights, not their average")
    parser.add_argument(
        "--no-experts", action="store_true", help="send every image to the versatile encoder, none to the STEM expert"
    )
