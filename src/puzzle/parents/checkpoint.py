"""A folder of safetensors files: which tensor is where, of what shape, and its values. Nothing is ever unpickled."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzle.errors import PuzzleError, one_line
from puzzle.runs import digest, file_digest, remembered

_DTYPES = ("F64", "F32", "F16", "BF16")
"""As safetensors names them; anything else is quantised, and its scales would be lost."""


class Entry(NamedTuple):
    """One stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, their headers read and checked, no weights loaded."""

    path: Path
    entries: dict[str, Entry]
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)
    """Tensors that were read before and found finite: streamed layers are read again and again."""

    def check(self, name: str, shape: Sequence[int]) -> None:
        """A `PuzzleError` unless the tensor is there, in floating point, with this shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise PuzzleError(f"parent: {self.path} lacks the tensor {name}; get the whole checkpoint")
        if entry.dtype not in _DTYPES:
            raise PuzzleError(f"parent: {name} is stored as {entry.dtype}; get a checkpoint that is not quantised")
        if entry.shape != tuple(shape):
            raise PuzzleError(f"parent: {name} has shape {list(entry.shape)}, its config.json asks for {list(shape)}")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as they are stored, file by file; a `PuzzleError` if one is not finite."""

        def file_of(name: str) -> Path:
            return self.entries[name].file

        for file, wanted in groupby(sorted(names, key=file_of), file_of):
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    tensor = handle.get_tensor(name)
                    if name not in self._finite and not tensor.isfinite().all():
                        raise PuzzleError(f"parent: {file.name} has NaN or infinity in {name}; get a sound checkpoint")
                    self._finite.add(name)
                    yield name, tensor

    def address(self, digests: Path | None) -> str:
        """Hash of the configuration and the weights; the file `digests` remembers those of files."""
        with remembered(digests) as known:
            files = sorted({entry.file for entry in self.entries.values()})
            return digest([file_digest(file, known) for file in (self.path / "config.json", *files)])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise PuzzleError(f"parent: {path} has no model.safetensors; pickled weights are not read, convert them")
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PuzzleError(f"parent: {index} cannot be read ({one_line(error)}); get the whole checkpoint") from None
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.exists():
            raise PuzzleError(f"parent: {file} is missing, though the checkpoint's index names it")
        try:
            with safe_open(file, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}
                entries |= {name: Entry(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise PuzzleError(f"parent: {file} is truncated or damaged ({one_line(error)}); get it again") from None
    return Checkpoint(path, entries)
