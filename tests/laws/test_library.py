"""Law 4: BLD never ends worse than it started, and in one layer wider is not worse."""

from collections import defaultdict

import pytest

from puzzle.library import Library
from puzzle.variants import parse_variant


def test_training_never_ends_worse_than_it_started(pico_library: Library) -> None:
    for row in pico_library.index.rows:
        assert row.loss <= row.initial_loss, row


def test_training_helps_every_variant_that_is_trained(pico_library: Library) -> None:
    trained = [row for row in pico_library.index.rows if row.trained_tokens]
    improved = [row for row in trained if row.loss < row.initial_loss]
    assert len(trained) == 4 * (2 + 6)
    assert len(improved) > 0.9 * len(trained)


def test_wider_is_not_worse(pico_library: Library) -> None:
    sized = defaultdict(list)
    for row in pico_library.index.rows:
        sizes = [v for k, v in parse_variant(row.subblock, row.variant).entry().items() if k != "kind"]  # type: ignore[arg-type]
        if sizes:
            sized[row.layer, row.subblock].append((sizes[0], row.loss))
    assert len(sized) == 4 * 2
    for rows in sized.values():
        losses = [loss for _, loss in sorted(rows)]
        assert losses == sorted(losses, reverse=True)


def test_none_has_a_loss_of_exactly_one(pico_library: Library) -> None:
    nones = [row for row in pico_library.index.rows if row.variant == "none"]
    assert [row.loss for row in nones] == pytest.approx([1.0] * 8)
    assert not any(row.file for row in nones)
