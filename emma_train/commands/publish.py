"""Where scores of `evaluate` go beside files: the model card of an export, and W&B."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.errors import UserError

if TYPE_CHECKING:
    from emma_train.generate.items import EvaluationItem


def check_publishing(arguments: argparse.Namespace) -> None:
    """Raise UserError, before hours of work, where --card has no export to write into."""
    from emma_train.export.export import is_export
    from emma_train.storage.paths import parse_path

    if arguments.card and not is_export(parse_path(arguments.model)):
        raise UserError(
            f"--card: {arguments.model} is not an export; make one with: emma-train export {arguments.model} OUT"
        )


def publish(
    arguments: argparse.Namespace,
    scores: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    folder: Path,
    items: "Sequence[EvaluationItem]" = (),
) -> None:
    """Write the card (--card) and send the scores (--wandb), of the checkpoint that was scored and of no other.

    config: the settings of the evaluation; folder: where the results are. Raises UserError, RunError.
    """
    if not arguments.card and not arguments.wandb:
        return
    from emma_train.evaluate.model_card import write_card
    from emma_train.evaluate.settings_file import checkpoint_digest
    from emma_train.evaluate.wandb_scores import send_scores
    from emma_train.export.stored_model import StoredModel

    model = StoredModel(arguments.model)
    scored = config.get("checkpoint_digest") or config["checkpoint"]["digest"]
    if checkpoint_digest(model.meta) != scored:
        raise UserError(f"{arguments.model}: is not the checkpoint that was scored; name that one")
    if arguments.card:
        num_parameters = sum(math.prod(spec.shape) for spec in model.specs.values())
        print(write_card(Path(arguments.model), arguments.benchmark, scores, config, model.meta, num_parameters))
    if arguments.wandb:
        name = f"evaluate {folder.resolve().name}"
        send_scores(folder, name, model.recipe, model.meta, scores, items)
