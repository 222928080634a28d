"""Law 3: a width equal to the parent's, and a KV-head count equal to the parent's, change nothing."""

from pathlib import Path

import pytest
import torch
from tests.conftest import pico_llama

from puzzle.parents import open_parent
from puzzle.recipe import LibrarySettings
from puzzle.variants import ParentSubblock, Variant, split_state
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.least_squares import least_squares_update as refit

OWN: dict[str, Variant] = {"attention": GroupedQuery(4), "ffn": GatedFFN(48)}


@pytest.mark.parametrize("variant", OWN.values(), ids=OWN)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [LibrarySettings(), LibrarySettings(start="paper")], ids=["default", "paper"])
def test_the_own_variant_starts_as_the_parents_subblock(
    variant: Variant, settings: LibrarySettings, bias: bool, tmp_path: Path
) -> None:
    pico_llama(attention_bias=bias, mlp_bias=bias).save_pretrained(tmp_path)
    parent = open_parent(str(tmp_path))
    state = split_state(parent.layer_state(2), variant.subblock, parent.config)
    found = variant.initialise(
        ParentSubblock(config=parent.config, variant=variant, state=state, statistics={}, settings=settings)
    )
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)

    model = parent.load()
    hidden_BTD = torch.randn(2, 7, 32)
    context = model.model.context(hidden_BTD)
    layers = (variant.build(parent.config, found), model.model.layers[2])
    assert torch.equal(*(layer.subblock_output(variant.subblock, hidden_BTD, **context) for layer in layers))


def test_refitting_to_all_channels_changes_nothing() -> None:
    """Also where calibration saw nothing: damping draws to the parent's weights, not to zero."""
    weight = torch.randn(8, 6, dtype=torch.float64)
    for activations in (torch.randn(20, 6, dtype=torch.float64), torch.zeros(20, 6, dtype=torch.float64)):
        assert torch.equal(refit(weight, activations.T @ activations / 20, torch.arange(6)), weight)
