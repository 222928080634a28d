"""Hugging Face datasets, `name[@revision][:config[:split]]`."""

import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puzzle.data.documents import Document, cell, check_column, import_extra
from puzzle.errors import PuzzleError, one_line

_SOURCE = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]*))?(?::(?P<split>.+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset at one commit."""

    name: str
    config: str | None
    split: str
    revision: str
    column: str
    streaming: bool
    """Read over the network row by row instead of downloading it whole; the order is the same."""

    @property
    def identity(self) -> list[str | None]:
        """What makes it another text when it changes."""
        return [self.name, self.config, self.split, self.revision]

    @cached_property
    def size(self) -> float:
        """Rows; unknown, so 0, when streaming."""
        return 0.0 if self.streaming else float(self._dataset.num_rows)

    def documents(self, start: int) -> Iterator[Document]:
        """The rows from number `start` on."""
        for number, row in enumerate(self._dataset.skip(start), start):
            place = f"{self.name} row {number}"
            yield Document(cell(row, self.column, place), place, 1.0)

    @cached_property
    def _dataset(self) -> Any:
        datasets = import_extra("datasets", f"data.source: {self.name}")
        try:
            dataset = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:  # whatever the library raises, the reader needs one line
            raise PuzzleError(f"data.source: dataset {self.name} cannot be loaded: {one_line(error)}") from None
        if dataset.column_names is None:  # a stream that does not know its columns; rows are checked one by one
            return dataset
        check_column(self.column, dataset.column_names, self.name)
        return dataset.select_columns([self.column])


def open_dataset(source: str, column: str, *, streaming: bool, known: MutableMapping[str, str]) -> HubDataset:
    """The dataset that `source` names, without loading it.

    `known` remembers to which commit a moving revision was resolved at first, so that a later push to the dataset does
    not change a run that has begun.
    """
    match = _SOURCE.fullmatch(source)
    if match is None or source.startswith("."):
        raise PuzzleError(f"data.source: {source} does not exist")
    name, revision = match["name"], match["revision"] or "main"
    key = f"dataset {name}@{revision}"
    if key not in known:
        import_extra("datasets", f"data.source: {source} is no file or folder here; reading it as a dataset")
        known[key] = revision if _COMMIT.fullmatch(revision) else _resolve(name, revision)
    return HubDataset(name, match["config"] or None, match["split"] or "train", known[key], column, streaming)


def _resolve(name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # whatever the hub client raises, the reader needs one line
        raise PuzzleError(
            f"data.source: {name} is no file or folder here, and the hub gives no such dataset ({one_line(error)}); "
            f"without network, name a commit of a downloaded one: {name}@<40 digits>"
        ) from None
