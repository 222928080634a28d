"""Fewer query heads: the ranking by what is lost where W_o is refitted, and what the starts then lose, exactly."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from tests.modeling.test_families import DENSE, SPARSE, as_puzzle, original
from tests.variants.conftest import activation_moments, spread_activations
from torch import Tensor

from puzzle.modeling import PuzzleForCausalLM
from puzzle.recipe import LibrarySettings
from puzzle.variants import ParentSubblock, Variant, parse_variant, split_state
from puzzle.variants.least_squares import damping, least_squares_update, rank_blocks

NORMED_TOGETHER = ("olmo2", "olmo3", "olmoe", "minimax_m2")
"""Their queries are normed over all heads at once."""
ONE_SIZE = ("helium", "stablelm")
"""Their output projections are as wide as the hidden size, whatever their heads."""
LATENT = ("deepseek_v2", "deepseek_v3")


def lost(weight_DI: Tensor, moment_II: Tensor, kept: list[int]) -> float:
    """By a solver that knows nothing of ours."""
    left, moment = weight_DI.numpy().copy(), moment_II.numpy()
    left[:, kept] -= np.linalg.lstsq(moment[np.ix_(kept, kept)], moment[kept] @ left.T, rcond=None)[0].T
    return float(np.trace(left @ moment @ left.T))


@pytest.mark.parametrize(("groups", "blocks"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_each_block_given_up_is_the_one_that_costs_least(groups: int, blocks: int) -> None:
    activation_NI = spread_activations(12)
    weight_DI = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment_II = activation_moments(activation_NI)["activation_second_moment"]
    damped_II = moment_II + torch.diag(damping(moment_II))
    left = [[(group, block) for block in range(blocks)] for group in range(groups)]
    gone: list[list[int]] = [[] for _ in range(groups)]

    def channels(some: list[tuple[int, int]]) -> list[int]:
        return [2 * (group * blocks + block) + part for group, block in sorted(some) for part in (0, 1)]

    for _ in range(blocks):
        every = [each for group in left for each in group]
        worst = [
            min(some, key=lambda one: lost(weight_DI, damped_II, channels([e for e in every if e != one])))
            for some in left
        ]
        for group, (_, block) in enumerate(worst):
            gone[group].insert(0, block)
            left[group].remove((group, block))
    assert rank_blocks(weight_DI, moment_II, groups, blocks).tolist() == gone


def parent_of(model: PuzzleForCausalLM, tokens_BT: Tensor, layer: int = 1) -> tuple[ParentSubblock, Tensor, Tensor]:
    """A layer's attention with the moments that calibration records on a text; its input, and what it adds."""
    seen: list[Tensor] = []
    hidden_BTD = model.model(tokens_BT, output_hidden_states=True).hidden_states[layer]
    module = model.model.layers[layer]
    with module.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))):
        added_BTD = module.subblock_output("attention", hidden_BTD, **model.model.context(hidden_BTD))
    entry = model.config.blocks[layer]["attention"]
    own = parse_variant(
        "attention", f"kv{entry['num_key_value_heads']}" + (f"win{entry['window']}" if "window" in entry else "")
    )
    state = split_state(module.state_dict(), "attention", model.config)
    moments = activation_moments(seen[0].double())
    return ParentSubblock(config=model.config, variant=own, state=state, statistics=moments), hidden_BTD, added_BTD


def added_by(variant: Variant, model: PuzzleForCausalLM, state: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
    return variant.build(model.config, state, 1).subblock_output(
        "attention", hidden_BTD, **model.model.context(hidden_BTD)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["kv2q2", "kv2q6", "kv2q4", "kv1q4"])
def test_what_a_start_loses_is_what_was_expected(name: str) -> None:
    """Heads that are kept compute what they did: so tr (W - W') C (W - W')^T is the error itself. More are no worse."""
    model = pico_puzzle("kv2+w48", "kv2+w48", num_attention_heads=8, head_dim=4).double()
    parent, hidden_BTD, added_BTD = parent_of(model, random_tokens(4, 30))
    variant = parse_variant("attention", name)
    assert variant.fits(parent.variant, model.config)
    state = variant.initialise(parent)
    error = float((added_by(variant, model, state, hidden_BTD) - added_BTD).square().sum(-1).mean())
    weight_DI, moment_II = parent.state["self_attn.o_proj.weight"], parent.statistics["activation_second_moment"]
    kv_heads, heads = variant.num_key_value_heads, variant.num_attention_heads
    groups, blocks, count = (1, 2, 1) if kv_heads == 1 else (2, 4, heads // 2)
    ranked = rank_blocks(weight_DI, moment_II, groups, blocks)[:, :count].sort(1).values
    kept = torch.arange(32).view(groups, blocks, -1)[torch.arange(groups).unsqueeze(1), ranked].flatten()
    left_DI = weight_DI.clone()
    left_DI[:, kept] -= least_squares_update(weight_DI, moment_II, kept)
    assert error == pytest.approx(float(torch.trace(left_DI @ moment_II @ left_DI.T)), rel=1e-6)
    sliced = variant.initialise(ParentSubblock(**vars(parent) | {"settings": LibrarySettings(start="paper")}))
    assert error < float((added_by(variant, model, sliced, hidden_BTD) - added_BTD).square().sum(-1).mean())


@torch.no_grad()
def test_more_heads_contain_fewer() -> None:
    model = pico_puzzle("kv2+w48", "kv2+w48", num_attention_heads=8, head_dim=4).double()
    parent, hidden_BTD, added_BTD = parent_of(model, random_tokens(4, 30))
    errors, rows = [], []
    for name in ("kv2q2", "kv2q4", "kv2q6"):
        state = parse_variant("attention", name).initialise(parent)
        rows.append({tuple(row.tolist()) for row in state["self_attn.q_proj.weight"]})
        found_BTD = added_by(parse_variant("attention", name), model, state, hidden_BTD)
        errors.append(float((found_BTD - added_BTD).square().mean()))
    assert all(fewer < more for fewer, more in pairwise(rows))
    assert all(more < fewer for fewer, more in pairwise(errors))


@torch.no_grad()
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("kv2q2", "kv2q4"),
        ("kv1q4", "kv2"),
        ("kv2q4", "kv2"),
        ("kv1q2", "kv2q4"),
        ("kv1q1", "kv2q2"),
        ("kv1q4", "kv2q4"),
        ("kv1q4", "kv2q8"),
    ],
)
def test_the_larger_one_computes_the_same(small: str, large: str) -> None:
    model = pico_puzzle("kv2+w48", "kv2+w48", num_attention_heads=8, head_dim=4).double()
    _, hidden_BTD, _ = parent_of(model, random_tokens(2, 9))
    narrow, wide = parse_variant("attention", small), parse_variant("attention", large)
    built = narrow.build(model.config)
    state = {
        name: torch.randn_like(value, device="cpu", dtype=torch.float64) for name, value in built.state_dict().items()
    }
    widened = narrow.widen(state, wide, model.config)
    assert widened is not None
    expected_BTD = added_by(narrow, model, state, hidden_BTD)
    torch.testing.assert_close(added_by(wide, model, widened, hidden_BTD), expected_BTD)
    assert wide.widen(widened, narrow, model.config) is None


@pytest.mark.parametrize("name", ["kv2q3", "kv2q8", "kv2q16", "kv1q2", "kv2q5", "kv4q4"])
def test_what_is_no_alternative(name: str) -> None:
    """Other numbers in each group, not fewer, or neither all groups nor all heads of some."""
    config = pico_puzzle("kv2+w48", num_attention_heads=8, head_dim=4).config
    assert not parse_variant("attention", name).fits(parse_variant("attention", "kv2"), config)


@torch.no_grad()
@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_families(family: str) -> None:
    """Where the attention allows it, what is lost is as expected; in joint matrices, with biases, sinks and windows."""
    model = as_puzzle(original(family))
    window = "win8" if "window" in model.config.blocks[1]["attention"] else ""
    own = parse_variant("attention", f"kv{model.config.blocks[1]['attention']['num_key_value_heads']}{window}")
    for name in (f"kv2q2{window}", f"kv1q2{window}"):
        variant = parse_variant("attention", name)
        fits = variant.fits(own, model.config)
        assert fits == (family not in (*NORMED_TOGETHER, *ONE_SIZE, *LATENT)), family
        if not fits:
            continue
        parent, hidden_BTD, added_BTD = parent_of(model, torch.randint(128, (3, 24)))
        state = variant.initialise(parent)
        found_BTD = added_by(variant, model, state, hidden_BTD)
        assert 0 < float((found_BTD - added_BTD).norm()) < float(added_BTD.norm()), family
