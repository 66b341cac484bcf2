"""Write an initial export from public Qwen3, SigLIP2 and DC-AE folders, for init.from of the first stage."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder to write; model.* overrides such as model.decoder.num_shared_layers=12 may follow",
    )
    parser.add_argument("--llm", metavar="DIR", required=True, help="Qwen3ForCausalLM")
    parser.add_argument("--vision", metavar="DIR", required=True, help="SiglipVisionModel or SiglipModel")
    parser.add_argument("--autoencoder", metavar="DIR", required=True, help="AutoencoderDC (diffusers)")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer.json or its folder (that of --llm)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the folder written."""
    from emma_train.export.import_hf import import_pretrained

    llm, vision, autoencoder = Path(arguments.llm), Path(arguments.vision), Path(arguments.autoencoder)
    tokenizer = Path(arguments.tokenizer or arguments.llm)
    print(import_pretrained(Path(arguments.out), llm, vision, autoencoder, tokenizer, overrides))
    return 0
