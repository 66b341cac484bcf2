"""What can be seen of a run from outside: its last step, what its nodes have written, where it hung."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs import metrics

TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Mark:
    """A moment: bytes of each console, and the files about hangs."""

    sizes: dict[Path, int]
    hangs: frozenset[Path]


@dataclass(frozen=True)
class RunView:
    """A run folder and the folder where its nodes write their consoles."""

    folder: Path
    logs: Path

    def last_row(self) -> dict[str, Any]:
        """The last complete line of metrics.jsonl; step 0 without any."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                for line in reversed(file.read().splitlines()):
                    try:
                        row: dict[str, Any] = json.loads(line)
                        return row
                    except ValueError:
                        continue  # it is being written
        return {"step": 0, "time_unix": 0.0}

    def step_s(self, last: int = 200) -> float:
        """Median of the times between the last rows."""
        times = [row["time_unix"] for row in metrics(self.folder)[-last:]]
        gaps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
        return gaps[len(gaps) // 2] if gaps else 0.0

    def mark(self) -> Mark:
        return Mark({path: path.stat().st_size for path in self.logs.glob("*.log")}, frozenset(self._hangs()))

    def console(self, since: Mark) -> str:
        """What all nodes have written since."""
        parts = []
        for path in sorted(self.logs.glob("*.log")):
            with open(path, "rb") as file:
                file.seek(since.sizes.get(path, 0))
                parts.append(file.read().decode(errors="replace"))
        return "\n".join(parts)

    def num_lines(self, name: str) -> int:
        path = self.folder / name
        return path.read_text().count("\n") if path.is_file() else 0

    def _hangs(self) -> list[Path]:
        return list((self.folder / "logs").glob("hang-*.txt"))

    def new_hangs(self, since: Mark) -> list[Path]:
        return sorted(set(self._hangs()) - since.hangs)


PATTERNS = (
    r"ranks? ([\d, and]*\d)(?: of \d+)?:? (?:died|hangs?\b|failed|does not answer|do not answer)",
    r"rank (\d+) (?:loader worker|reads \S+ of shard)",
    r"rank (\d+) on \S+ computed",
)


def suspects(text: str) -> set[int]:
    """Ranks that lines of the console name as dead, hanging, stopped or failed."""
    names = [match for pattern in PATTERNS for match in re.findall(pattern, text)]
    return {int(number) for name in names for number in re.findall(r"\d+", name)}
