"""A homogeneous Puzzle model behaves as LlamaForCausalLM does, in everything that callers of transformers use."""

import pytest
import torch
from tests.conftest import pico_llama, pico_puzzle, random_tokens
from transformers import DynamicCache, LlamaForCausalLM

from puzzle.modeling import PuzzleForCausalLM

Pair = tuple[LlamaForCausalLM, PuzzleForCausalLM]
CHECKPOINTING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
"""Its newer name is not in all versions that are supported."""
MIXED = ("none+w48", "kv2win3s1+w16", "linear+none", "kv1win4+linear")


@pytest.fixture
def pair() -> Pair:
    llama = pico_llama()
    model = pico_puzzle(*["kv4+w48"] * 4)
    model.load_state_dict(llama.state_dict())
    return llama, model


@torch.no_grad()
def test_hidden_states(pair: Pair) -> None:
    """Embeddings, every layer's output, and in place of the last one its norm."""
    tokens_BT = random_tokens(2, 6)
    expected, found = (model(tokens_BT, output_hidden_states=True).hidden_states for model in pair)
    assert len(found) == len(expected) == 5
    assert all(map(torch.equal, found, expected))
    assert pair[1](tokens_BT).hidden_states is None
    pair[1].config.output_hidden_states = True
    assert len(pair[1](tokens_BT).hidden_states) == 5


@torch.no_grad()
def test_the_base_model(pair: Pair) -> None:
    tokens_BT = random_tokens(2, 6)
    expected, found = (model.model(tokens_BT) for model in pair)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    first, *_ = pair[1].model(tokens_BT, use_cache=False, return_dict=False)
    assert torch.equal(first, expected.last_hidden_state)


def test_loss(pair: Pair) -> None:
    tokens_BT = random_tokens(2, 6)
    labels_BT = tokens_BT.clone()
    labels_BT[0, :3] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected, found = (model(tokens_BT, labels=labels_BT, **extra) for model in pair)
        assert torch.equal(found.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 2])])
def test_logits_to_keep(pair: Pair, kept: int | torch.Tensor) -> None:
    tokens_BT = random_tokens(2, 6)
    expected, found = (model(tokens_BT, logits_to_keep=kept).logits for model in pair)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("through_config", [False, True])
def test_tuples(pair: Pair, through_config: bool) -> None:
    tokens_BT = random_tokens(2, 6)
    arguments = {"labels": tokens_BT, "output_hidden_states": True, "use_cache": True}
    expected = pair[0](tokens_BT, **arguments, return_dict=False)
    pair[1].config.return_dict = not through_config
    found = pair[1](tokens_BT, **arguments, **({} if through_config else {"return_dict": False}))
    assert isinstance(found, tuple)
    assert len(found) == len(expected) == 4
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert isinstance(found[2], DynamicCache)
    assert all(map(torch.equal, found[3], expected[3]))


@torch.no_grad()
def test_embeddings_as_input(pair: Pair) -> None:
    tokens_BT = random_tokens(2, 6)
    hidden_BTD = pair[0].model.embed_tokens(tokens_BT)
    assert torch.equal(pair[1](inputs_embeds=hidden_BTD).logits, pair[0](tokens_BT).logits)
    for arguments in ({}, {"input_ids": tokens_BT, "inputs_embeds": hidden_BTD}):
        with pytest.raises(ValueError, match="exactly one"):
            pair[1](**arguments)


@torch.no_grad()
def test_the_cache(pair: Pair) -> None:
    tokens_BT = random_tokens(2, 6)
    found = pair[1](tokens_BT).past_key_values
    assert found.get_seq_length() == 6
    assert all(
        torch.equal(ours.keys, theirs.keys)
        for ours, theirs in zip(found.layers, pair[0](tokens_BT).past_key_values.layers, strict=True)
    )
    assert pair[1](tokens_BT, use_cache=False).past_key_values is None
    pair[1].config.use_cache = False
    assert pair[1](tokens_BT).past_key_values is None
    given = DynamicCache(config=pair[1].config)
    assert pair[1](tokens_BT, past_key_values=given).past_key_values is given


@CHECKPOINTING
def test_no_cache_in_training_unless_asked(pair: Pair) -> None:
    model = pair[1].train()
    tokens_BT = random_tokens(2, 6)
    assert model(tokens_BT).past_key_values is None
    assert model(tokens_BT, use_cache=True).past_key_values is not None
    model.gradient_checkpointing_enable()
    assert model(tokens_BT, use_cache=True).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("blocks", [("kv4+w48",) * 4, MIXED])
def test_the_attention_implementation_can_be_set(blocks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that is built already, with every layer following, and masks made for it."""
    model = pico_puzzle(*blocks)
    assert model.config._attn_implementation == "sdpa"
    tokens_BT = random_tokens(2, 6)
    expected_BTV = model(tokens_BT).logits
    calls: list[str] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append("sdpa") or sdpa(*args, **kwargs),
    )
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens_BT).logits, expected_BTV, rtol=1e-4, atol=1e-4)
    assert not calls
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(tokens_BT).logits, expected_BTV)
    assert len(calls) == model.config.num_hidden_layers


@CHECKPOINTING
@pytest.mark.parametrize("blocks", [("kv4+w48",) * 4, MIXED, ("none+none",) * 2])
def test_gradient_checkpointing_changes_no_gradient(blocks: tuple[str, ...]) -> None:
    """Every half of every layer runs twice, and the gradients are the same."""
    tokens_BT = random_tokens(2, 6)
    model = pico_puzzle(*blocks).train()
    runs: list[str] = []
    for layer in model.model.layers:
        for name, subblock in layer.named_children():
            subblock.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    gradients, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens_BT, labels=tokens_BT).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        counts.append(len(runs))
    assert all(torch.equal(gradients[1][name], gradients[0][name]) for name in gradients[0])
    assert counts[1] == 3 * counts[0]


def test_attention_gets_the_callers_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines pass their own state down to the attention as keyword arguments."""
    model = pico_puzzle(*MIXED)
    seen: list[object] = []
    for layer in model.model.layers:
        if layer.has("attention"):
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["attention_instances"]), with_kwargs=True
            )
    model(random_tokens(1, 4), attention_instances="the engine's")
    assert seen == ["the engine's"] * 3


def test_attention_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        pico_puzzle("kv4+w48")(random_tokens(1, 4), output_attentions=True)
    pico_puzzle("kv4+w48")(random_tokens(1, 4), output_attentions=False)
