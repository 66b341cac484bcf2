"""Which tokenizer and autoencoder weights belong to, by content: weights mean nothing with others."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from emma_train.config.renamed import current_key
from emma_train.errors import UserError
from emma_train.sequence.tokens import TextTokenizer

log = logging.getLogger(__name__)
CONTENT = "content"
"""Key of the hashes in the metadata of checkpoints and exports."""


def content_hashes(tokenizer: TextTokenizer, autoencoder_fingerprint: str) -> dict[str, str]:
    """The hashes, by the key of the recipe that names the files."""
    return {"data.tokenizer": tokenizer.sha256, "model.autoencoder.path": autoencoder_fingerprint}


def check_content(
    meta: Mapping[str, Any], current: Mapping[str, str], source: str, allowed: Collection[str] = ()
) -> None:
    """Raise UserError where `current` differs from the hashes in the metadata of `source`, unless `allowed` names the
    key. A log line says so where an older version wrote no hashes."""
    stored = meta.get(CONTENT)
    if not isinstance(stored, Mapping):
        log.info("%s: an older version wrote it, without hashes of tokenizer and autoencoder: not compared", source)
        return
    accepted = {current_key(key) for key in allowed}
    for key, value in current.items():
        if key in stored and stored[key] != value and key not in accepted:
            raise UserError(
                f"{source}: its weights belong to another {key}: its content has the hash {stored[key]} there and "
                f"{value} here; name the files that it was trained with"
            )
