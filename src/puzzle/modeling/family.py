"""Which families of transformers are parents, found by trying, and what their own layers are."""

import json
from functools import lru_cache
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from puzzle.modeling.configuration_puzzle import Block, PuzzleConfig
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM, family_config, family_layer, form_of

_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "sliding_window": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    # Of experts, by the names that families have for one thing.
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("moe_num_shared_experts",), 1),
    # Factors, which are 1 by default.
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.25,
    "logits_scaling": 1.5,
    # Of latent attention.
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
"""A small model of any family, in whose six layers the patterns of windows, positions and experts occur."""
_TOKENS = 24


def tiny_config(model_type: str) -> Any:
    """A family's configuration of a small model; a `ValueError` if transformers does not know it."""
    known = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in _TINY.items() if hasattr(known, name)}
    if "kv_lora_rank" in sizes:  # latent attention has a KV head for each query head, and other head sizes
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        del sizes["head_dim"]
    return AutoConfig.for_model(model_type, **sizes)


def puzzle_config(family: Any) -> PuzzleConfig:
    """The configuration as a Puzzle model's, whose blocks are all the parent's own."""
    left_out = ("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version")
    fields = {name: value for name, value in family.to_dict().items() if name not in left_out}
    config = PuzzleConfig(**fields, base_model_type=family.model_type, parent=fields, blocks=[])
    return PuzzleConfig(**config.to_dict() | {"blocks": own_blocks(config), "dtype": family.dtype})


def first_layer(config: PuzzleConfig, subblock: str, kind: str) -> int:
    """The first of the parent's own layers with this kind; 0 if none has it."""
    kinds = [block[subblock]["kind"] for block in _own_blocks(config.base_model_type, json.dumps(config.parent))]
    return kinds.index(kind) if kind in kinds else 0


@lru_cache(maxsize=64)
def _own_blocks(model_type: str, fields: str) -> list[Block]:
    return own_blocks(PuzzleConfig(base_model_type=model_type, parent=json.loads(fields), blocks=[]))


def own_blocks(config: PuzzleConfig) -> list[Block]:
    """The entries of the parent's own layers.

    Raises:
        ValueError: a layer is of no form that is known.
    """
    family, blocks = family_config(config), []
    window = getattr(family, "sliding_window", None) if getattr(family, "use_sliding_window", True) else None
    types = getattr(family, "layer_types", None) or ["sliding_attention"] * family.num_hidden_layers
    for index, layer_type in enumerate(types[: family.num_hidden_layers]):
        with torch.device("meta"):
            layer = family_layer(config, index)
        form_of(layer)
        heads = getattr(family, "num_key_value_heads", None) or family.num_attention_heads
        attention: dict[str, Any] = {"kind": "gqa", "num_key_value_heads": heads}
        if window is not None and layer_type == "sliding_attention":
            attention["window"] = window
        dense = {"kind": "gated", "intermediate_size": family.intermediate_size}
        blocks.append({"attention": attention, "ffn": {"kind": "experts"} if hasattr(layer.mlp, "experts") else dense})
    return blocks


def rotates(config: PuzzleConfig, index: int) -> bool:
    """Whether attention in the parent's layer `index` knows positions: SmolLM3 leaves them out in every fourth."""
    layers = getattr(family_config(config), "no_rope_layers", None)  # which says 1 of those that have them
    return layers is None or bool(layers[index])


@lru_cache
def refusal(model_type: str) -> str:
    """Why models of a family cannot be parents; empty if they can.

    A small model of random weights must give the logits of transformers' own class, bit for bit.
    """
    try:
        family = tiny_config(model_type)
        if type(family) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "transformers has no causal language model of it"
        generator = torch.random.get_rng_state()
        original = AutoModelForCausalLM.from_config(family).eval()
        model = PuzzleForCausalLM(puzzle_config(family)).eval()
        for parameter in original.parameters():
            parameter.data.normal_(std=0.1)
        model.load_state_dict(original.state_dict())
        tokens_BT = torch.randint(family.vocab_size, (2, _TOKENS))
        torch.random.set_rng_state(generator)
        with torch.no_grad():
            difference = float((model(tokens_BT).logits - original(tokens_BT).logits).abs().max())
    except Exception as error:  # modules that are built or called otherwise raise what they like
        return " ".join(str(error).split())[:200] or type(error).__name__
    return f"its logits differ by {difference:.1e}" if difference else ""
