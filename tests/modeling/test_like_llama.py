"""A homogeneous Puzzle model behaves as LlamaForCausalLM does, in everything that callers of transformers use."""

from typing import Any

import pytest
import torch
from tests.conftest import pico_llama, pico_puzzle, random_tokens
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, LlamaForCausalLM

from puzzle.modeling import PuzzleForCausalLM

Pair = tuple[LlamaForCausalLM, PuzzleForCausalLM]
CHECKPOINTING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
"""Its newer name is not in all versions that are supported."""
TOKENS_BT = random_tokens(2, 6)
MIXED = ("none+w48", "kv2win3s1+w16", "linear+none", "kv1win4+linear")


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Shared by all tests: none may change it."""
    llama = pico_llama()
    model = pico_puzzle(*["kv4+w48"] * 4)
    model.load_state_dict(llama.state_dict())
    return llama, model


@torch.no_grad()
def test_hidden_states_and_cache(pair: Pair) -> None:
    """Embeddings, every layer's output, and in place of the last one its norm; and every layer's keys."""
    expected, found = (model(TOKENS_BT, output_hidden_states=True) for model in pair)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert found.past_key_values.get_seq_length() == 6
    caches = zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True)
    assert all(torch.equal(ours.keys, theirs.keys) for ours, theirs in caches)
    given = DynamicCache(config=pair[1].config)
    assert pair[1](TOKENS_BT, past_key_values=given).past_key_values is given
    plain = pair[1](TOKENS_BT, use_cache=False)
    assert (plain.past_key_values, plain.hidden_states) == (None, None)
    first, *_ = pair[1].model(TOKENS_BT, use_cache=False, return_dict=False)
    assert torch.equal(first, expected.hidden_states[-1])


def test_loss(pair: Pair) -> None:
    labels_BT = TOKENS_BT.clone()
    labels_BT[0, :3] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected, found = (model(TOKENS_BT, labels=labels_BT, **extra) for model in pair)
        assert torch.equal(found.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 2])])
def test_logits_to_keep(pair: Pair, kept: int | torch.Tensor) -> None:
    expected, found = (model(TOKENS_BT, logits_to_keep=kept).logits for model in pair)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_tuples_as_asked_by_the_call_or_the_configuration(pair: Pair) -> None:
    arguments = {"labels": TOKENS_BT, "output_hidden_states": True, "return_dict": False}
    expected, found = (model(TOKENS_BT, **arguments) for model in pair)
    assert len(found) == len(expected) == 4
    assert all(map(torch.equal, (*found[:2], *found[3]), (*expected[:2], *expected[3])))
    assert isinstance(found[2], DynamicCache)
    model = pico_puzzle(*["kv4+w48"] * 2)
    model.config.output_hidden_states, model.config.use_cache, model.config.return_dict = True, False, False
    logits_BTV, hidden_states = model(TOKENS_BT)
    assert torch.equal(model.lm_head(hidden_states[-1]), logits_BTV)


@torch.no_grad()
def test_embeddings_as_input(pair: Pair) -> None:
    hidden_BTD = pair[0].model.embed_tokens(TOKENS_BT)
    assert torch.equal(pair[1](inputs_embeds=hidden_BTD).logits, pair[0](TOKENS_BT).logits)
    for arguments in ({}, {"input_ids": TOKENS_BT, "inputs_embeds": hidden_BTD}):
        with pytest.raises(ValueError, match="exactly one"):
            pair[1](**arguments)


@CHECKPOINTING
def test_no_cache_in_training_unless_asked() -> None:
    model = pico_puzzle("kv4+w48").train()
    assert model(TOKENS_BT).past_key_values is None
    assert model(TOKENS_BT, use_cache=True).past_key_values is not None
    model.gradient_checkpointing_enable()
    assert model(TOKENS_BT, use_cache=True).past_key_values is None


class Calls(TorchFunctionMode):
    """The functions of torch that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("blocks", [("kv4+w48",) * 4, MIXED])
def test_the_attention_implementation_can_be_set(blocks: tuple[str, ...]) -> None:
    """On a model that is built already, with every layer following, and masks made for it."""
    model = pico_puzzle(*blocks)
    assert model.config._attn_implementation == "sdpa"
    expected_BTV = model(TOKENS_BT).logits
    model.set_attn_implementation("eager")
    with Calls() as calls:
        torch.testing.assert_close(model(TOKENS_BT).logits, expected_BTV, rtol=1e-4, atol=1e-4)
    assert scaled_dot_product_attention not in calls.seen
    model.set_attn_implementation("sdpa")
    with Calls() as calls:
        assert torch.equal(model(TOKENS_BT).logits, expected_BTV)
    assert calls.seen.count(scaled_dot_product_attention) == model.config.num_hidden_layers


@CHECKPOINTING
@pytest.mark.parametrize("blocks", [("kv4+w48",) * 4, MIXED, ("none+none",) * 2])
def test_gradient_checkpointing_changes_no_gradient(blocks: tuple[str, ...]) -> None:
    """Every subblock of every layer runs twice, and the gradients are the same."""
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
        model(TOKENS_BT, labels=TOKENS_BT).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        counts.append(len(runs))
    assert all(torch.equal(gradients[1][name], gradients[0][name]) for name in gradients[0])
    assert counts[1] == 3 * counts[0]


def test_attention_gets_the_callers_arguments() -> None:
    """Engines pass their own state down to the attention as keyword arguments."""
    model = pico_puzzle(*MIXED)
    seen: list[object] = []
    for layer in model.model.layers:
        if "attention" in layer.norm_names:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["attention_instances"]), with_kwargs=True
            )
    model(random_tokens(1, 4), attention_instances="the engine's")
    assert seen == ["the engine's"] * 3


def test_attention_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        pico_puzzle("kv4+w48")(random_tokens(1, 4), output_attentions=True)
    pico_puzzle("kv4+w48")(random_tokens(1, 4), output_attentions=False)
