"""A run at pico size, and an engine whose times are planted."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

from puzzle.costs import Sample
from puzzle.parents import Parent, open_parent
from puzzle.recipe import Recipe
from puzzle.runs import Run, create_folder, open_run
from puzzle.variants import BlockVariant, Space, derive_space

EMPTY_LAYER_MS = 0.25
FIXED_MS = 3.0


def planted_ms(name: str, batch_size: int) -> float:
    """What a subblock costs on the fake engine: nothing for `none`, else a number of its own."""
    return 0.0 if name == "none" else batch_size * (1.0 + sum(map(ord, name)) % 97 / 8)


class FakeEngine:
    """Additive and exact, but for the slow rounds; a decode step takes a tenth of a prefill."""

    environment: Mapping[str, str] = {"engine": "fake 1", "device": "abacus", "threads": "1"}

    def __init__(self, fail_after: int | None = None, slow_every: int | None = None) -> None:
        self.calls: list[tuple[tuple[BlockVariant, ...], int]] = []
        self.fail_after, self.slow_every = fail_after, slow_every

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        if len(self.calls) == self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(blocks), batch_size))
        prefill_ms = FIXED_MS + sum(
            EMPTY_LAYER_MS + planted_ms(block.attention.name, batch_size) + planted_ms(block.ffn.name, batch_size)
            for block in blocks
        )
        return Sample(prefill_ms=prefill_ms, decode_ms=prefill_ms / 10)


@pytest.fixture(scope="session")
def parent(pico_checkpoint: Path) -> Parent:
    return open_parent(str(pico_checkpoint))


@pytest.fixture(scope="session")
def space(parent: Parent) -> Space:
    return derive_space(parent.config, ffn_widths=[24, 16])


@pytest.fixture
def run(pico_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with opened(pico_checkpoint, tmp_path / "run") as run:
        yield run


@contextmanager
def opened(pico_checkpoint: Path, folder: Path) -> Iterator[Run]:
    recipe = Recipe.model_validate(
        {
            "parent": str(pico_checkpoint),
            "data": {"source": "unused.txt"},
            "scenario": {"batch_sizes": [2, 3], "prompt_tokens": 6, "generated_tokens": 5},
            "cost": {"repeats": 3},
            "execution": {"device": "cpu", "threads": 1},
        }
    )
    create_folder(folder, recipe)
    with open_run(folder) as run:
        yield run
