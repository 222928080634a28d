"""A run at pico size, and an engine whose times are planted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from puzzle.artefacts import Scenario
from puzzle.costs import ENGINES, Sample
from puzzle.costs.engine import Engine, Model, shapes_of
from puzzle.parents import Parent, open_parent
from puzzle.recipe import Recipe
from puzzle.runs import Run, create_folder, open_run
from puzzle.variants import Architecture, BlockVariant, Space, derive_space

EMPTY_LAYER_MS = 0.25
FIXED_MS = 3.0


def planted_ms(name: str, batch_size: int) -> float:
    """What a subblock costs on the fake engine: nothing for `none`, else a number of its own."""
    return 0.0 if name == "none" else batch_size * (1.0 + sum(map(ord, name)) % 97 / 8)


class FakeEngine(Engine):
    """Additive and exact, but for `slowdown`; a decode step takes a tenth of a prefill."""

    version = "fake 1"
    environment: Mapping[str, str] = {"engine": "fake 1", "device": "abacus", "threads": "1"}

    def __init__(self, slowdown: Callable[[int], float] = lambda call: 1.0, fail_after: int | None = None) -> None:
        self.calls: list[tuple[tuple[BlockVariant, ...], int]] = []
        self._slowdown, self._fail_after = slowdown, fail_after

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        stack = Architecture.of(shapes_of(model)).blocks
        return [[self._sample(stack, batch_size) for _ in range(rounds)] for batch_size in batch_sizes]

    def _sample(self, stack: tuple[BlockVariant, ...], batch_size: int) -> Sample:
        if len(self.calls) == self._fail_after:
            raise KeyboardInterrupt
        factor = self._slowdown(len(self.calls))
        self.calls.append((stack, batch_size))
        times = self.times(stack, batch_size)
        return Sample(factor * times.prefill_ms, factor * times.decode_ms)

    def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
        subblocks_ms = sum(planted_ms(variant.name, batch_size) for block in stack for variant in block.subblocks)
        prefill_ms = FIXED_MS + EMPTY_LAYER_MS * len(stack) + subblocks_ms
        return Sample(prefill_ms, prefill_ms / 10)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeEngine], FakeEngine]:
    """Lets the engine `torch` be another one."""

    def put(engine: FakeEngine) -> FakeEngine:
        def on(scenario: Scenario) -> FakeEngine:
            engine.scenario = scenario
            return engine

        monkeypatch.setitem(ENGINES, "torch", on)
        return engine

    return put


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
def opened(pico_checkpoint: Path, folder: Path, **cost: object) -> Iterator[Run]:
    recipe = Recipe.model_validate(
        {
            "parent": str(pico_checkpoint),
            "data": {"source": "unused.txt"},
            "precision": "float32",
            "scenario": {"batch_sizes": [2, 3], "prompt_tokens": 6, "generated_tokens": 5},
            "cost": {"repeats": 3, **cost},
            "execution": {"device": "cpu", "threads": 1},
        }
    )
    create_folder(folder, recipe)
    with open_run(folder) as run:
        yield run
