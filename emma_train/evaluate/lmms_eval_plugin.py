"""What lmms-eval finds under the entry point group `lmms_eval.models` (setup.cfg): the names of our adapters."""

from typing import Any


def manifests() -> list[Any]:
    """lmms-eval's manifests: `--model emma`, with chat messages, or with --force_simple for tasks of likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "emma_train.evaluate.lmms_eval_model"
    return [
        ModelManifest(model_id="emma", chat_class_path=f"{module}.EmmaChat", simple_class_path=f"{module}.EmmaSimple")
    ]
