"""Every finished measurement on disk at once, so that a restart repeats none."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from puzzle.costs.engine import Sample


@dataclass(frozen=True, kw_only=True)
class Key:
    """Which measurement."""

    stack: str
    batch_size: int
    round: int


class Journal:
    """A file with one line of JSON a measurement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.samples = _read(path)

    def add(self, key: Key, sample: Sample) -> None:
        """Keep a measurement; it is on the disk when this returns."""
        self.samples[key] = sample
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(key) | asdict(sample)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> dict[Key, Sample]:
    """The measurements in a file; a last line that was cut off is dropped from it."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, torn = text.rpartition("\n")
    if torn:
        os.truncate(path, len(text.encode()) - len(torn.encode()))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {
        Key(stack=row["stack"], batch_size=row["batch_size"], round=row["round"]): Sample(
            prefill_ms=row["prefill_ms"], decode_ms=row["decode_ms"]
        )
        for row in rows
    }
