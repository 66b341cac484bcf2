"""Write a checkpoint as safetensors, config and tokenizer, loadable without torch.distributed."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint, or a URL of one")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--no-ema", action="store_true", help="export the weights, not their average")
    parser.add_argument(
        "--precision",
        choices=("stored", "bf16"),
        default="stored",
        help="of the weights: as the checkpoint stores them, or rounded to bf16, half as large (%(default)s)",
    )
    parser.add_argument(
        "--as",
        dest="format",
        choices=("emma", "qwen3"),
        default="emma",
        help="emma: the whole model, for generate and init.from; qwen3: what understands, as transformers loads it "
        "(%(default)s)",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the folder written."""
    import torch

    from emma_train.export import export as exports
    from emma_train.export.content import check_content, content_hashes
    from emma_train.export.qwen3 import write_qwen3
    from emma_train.export.stored_model import StoredModel
    from emma_train.generate.settings import read_settings, write_settings
    from emma_train.model import autoencoder as autoencoders
    from emma_train.sequence.tokens import TextTokenizer
    from emma_train.storage.paths import parse_path

    dtype = torch.bfloat16 if arguments.precision == "bf16" else None
    model, out = StoredModel(arguments.checkpoint, not arguments.no_ema, dtype), Path(arguments.out)
    fingerprint = autoencoders.fingerprint(Path(model.recipe.model.autoencoder.path))
    tokenizer = TextTokenizer(model.recipe.data.tokenizer)
    check_content(model.meta, content_hashes(tokenizer, fingerprint), arguments.checkpoint)
    settings = read_settings(parse_path(arguments.checkpoint), model.recipe)
    if arguments.format == "qwen3":
        write_qwen3(out, model)
    else:
        exports.write_export(out, model.specs, model.read, model.recipe, model.meta, tokenizer.path)
        write_settings(out, *settings)
    print(out)
    return 0
