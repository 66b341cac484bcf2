"""Functions that ranks run in the tests of `evaluate --benchmark`."""

import os
import signal

from emma_train.cli import main
from emma_train.evaluate.image_folder import ImageFolder


def killed_command(argv: list[str], num_files: int) -> int:
    """`evaluate --benchmark` that is killed while it writes its file number `num_files` + 1."""
    write, written = ImageFolder.write, 0

    def counted(self: ImageFolder, path: str, content: bytes) -> None:
        nonlocal written
        if written == num_files:
            (self.images / path).parent.mkdir(parents=True, exist_ok=True)
            write(self, path, content[: len(content) // 2]) if num_files % 2 else None
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, path, content)
        written += 1

    ImageFolder.write = counted  # type: ignore[method-assign]
    return main(argv)
