"""Keeps answers of chat models on disk, so that no question is paid for twice."""

import json
import logging
import os
import tempfile
from pathlib import Path

from emma_train.errors import RunError
from emma_train.storage.files import make_folder

log = logging.getLogger(__name__)


class AnswerCache:
    """A folder with one file per answer, `ab/abcdef....json`, named by the key of its request.

    Any number of processes may share it. A file appears at once and complete; one that cannot be read is ignored and
    written again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError if nothing can be written into the folder."""
        make_folder(folder)
        self.folder = folder

    def get(self, key: str) -> str | None:
        """The answer to a request, or None."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_bytes())
            answer = entry["answer"] if entry["key"] == key else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            answer = None
        if not isinstance(answer, str):
            log.warning("%s: not a cached answer; asking again", path)
            return None
        return answer

    def put(self, key: str, answer: str) -> None:
        """Keep an answer. Raises RunError."""
        path = self._path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            # Each writer has a name of its own: two processes may write the same answer at once.
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".new", delete=False) as file:
                json.dump({"key": key, "answer": answer}, file)
            os.replace(file.name, path)
        except OSError as error:
            raise RunError(f"{path}: cannot keep an answer ({error.strerror}); make space, then run again") from None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
