"""Families whose models are another spelling of a plain Llama or Qwen3, which engines know in any sizes."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle.modeling.family import puzzle_config, refusal, tiny_config
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM, family_config

_TOKENS = 8
"""No more than the small models' windows hold: windows are another matter, as are layers without positions."""


class Plain(NamedTuple):
    """A tensor of the plain model, by one of the child's."""

    source: str
    rows: slice = slice(None)
    factor: float = 1.0

    def of(self, tensor: Tensor) -> Tensor:
        """From the source's values."""
        return tensor[self.rows] if self.factor == 1 else tensor[self.rows] * self.factor


def plain_tensors(model: PuzzleForCausalLM) -> dict[str, Plain]:
    """The tensors of the plain model: joint matrices are taken apart, and the family's factors put into matrices.

    The head is among them where these make it another one than the embeddings.

    Args:
        model: may be without memory.
    """
    config, family, found = model.config, family_config(model.config), dict[str, Plain]()
    head_dim = config.head_dim or 1
    scale = getattr(family, "attention_multiplier", head_dim**-0.5) * head_dim**0.5
    added, embedded, divisor = (
        getattr(family, name, 1.0) for name in ("residual_multiplier", "embedding_multiplier", "logits_scaling")
    )
    factors = {"self_attn.q_proj": scale, "self_attn.o_proj": added, "self_attn.linear_attn": added}
    factors |= {"mlp.down_proj": added, "model.embed_tokens": embedded, "lm_head": 1 / divisor}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if embedded != 1 or divisor != 1:
        shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        layer, local = (".".join(module.split(".")[:3]), ".".join(module.split(".")[3:]))
        queries, half = shapes.get(f"{layer}.self_attn.o_proj.weight", shape)[-1], shape[0] // 2
        parts = {
            "self_attn.qkv_proj": (("q", 0), ("k", queries), ("v", queries + (shape[0] - queries) // 2)),
            "mlp.gate_up_proj": (("gate", 0), ("up", half)),
        }.get(local, ())
        for place, (part, start) in enumerate(parts):
            plain = f"{local.partition('.')[0]}.{part}_proj"
            rows = slice(start, parts[place + 1][1] if place + 1 < len(parts) else None)
            found[f"{layer}.{plain}.{kind}"] = Plain(name, rows, factors.get(plain, 1.0))
        if not parts:
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            source = "model.embed_tokens.weight" if tied else name
            found[name] = Plain(source, factor=factors.get(local or module, factors.get(module, 1.0)))
    return found


@lru_cache
def plain_shape(model_type: str) -> str:
    """Of which plain model a family is another spelling: `llama`, `qwen3`, or empty for neither.

    Found by trying: a small model's tensors, renamed and scaled, in that model's class.
    """
    if refusal(model_type):
        return ""
    family, generator = tiny_config(model_type), torch.random.get_rng_state()
    if hasattr(family, "no_rope_layers"):
        family.no_rope_layers = [1] * family.num_hidden_layers
    original = AutoModelForCausalLM.from_config(family).eval()
    for parameter in original.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    tokens_BT = torch.randint(family.vocab_size, (2, _TOKENS))
    torch.random.set_rng_state(generator)
    config, own = puzzle_config(family), original.state_dict()
    with torch.device("meta"):
        tensors = plain_tensors(PuzzleForCausalLM(config))
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: getattr(config, name) for name in (*same, "hidden_act", "rope_parameters")}
    eps = next((value for name, value in family.to_dict().items() if name.endswith("norm_eps")), 1e-6)
    sizes |= {"num_hidden_layers": config.num_layers, "rms_norm_eps": eps}
    for plain in ("llama", "qwen3"):
        biased = AutoConfig.for_model(plain, **sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(biased).eval()
        state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        state["lm_head.weight"] = own["lm_head.weight"]
        try:
            model.load_state_dict(state | {name: each.of(own[each.source]) for name, each in tensors.items()})
        except RuntimeError:  # it has tensors that the plain model does not know
            continue
        with torch.no_grad():
            expected_BTV = original(tokens_BT).logits
            if float((model(tokens_BT).logits - expected_BTV).abs().max()) < 1e-4 * float(expected_BTV.abs().max()):
                return plain
    return ""
