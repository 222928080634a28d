"""DeciLM checkpoints (`block_configs`, as Nemotron 51B has): for vLLM's own implementation, TensorRT-LLM and mlx-lm."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from puzzle.errors import PuzzleError
from puzzle.export.capability import check, is_empty, require
from puzzle.export.checkpoint import (
    ChildFiles,
    Stored,
    copy_extra_files,
    layer_tensors,
    open_child,
    outer_tensors,
    whole_folder,
    write_config,
    write_shards,
)
from puzzle.modeling import Block, PuzzleConfig

DeciReader = Literal["deci", "tensorrt-llm", "mlx-lm"]
FFNSizes = Literal["intermediate_size", "ffn_mult"]

_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
_MULTIPLE = 256
"""What every reader of `ffn_mult` rounds up to."""
_COPIED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "num_attention_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_MLX_NAMES = (("self_attn.linear_attn.", "self_attn.linear."), ("mlp.linear_mlp.", "mlp.linear."))
_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_deci(
    source: Path,
    target: Path,
    *,
    reader: DeciReader = "deci",
    ffn_sizes: FFNSizes | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the child at `source` as a DeciLM checkpoint into the folder `target`.

    Layers that are empty are left out. A first layer without attention gets one of a single KV head with zero weights
    where the reader cannot do without: the only rewrite that this format knows.

    Args:
        reader: the engine it is for, see `puzzle.export.targets`.
        ffn_sizes: how FFN widths are written; default: as the reader asks, `intermediate_size` for vLLM.

    Raises:
        PuzzleError: the reader cannot run a layer, or `ffn_mult` cannot express a width.
    """
    child = open_child(source)
    require(child.config, reader)
    sizes = ffn_sizes or ("intermediate_size" if reader == "deci" else "ffn_mult")
    if reader != "deci" and sizes != "ffn_mult":
        raise PuzzleError(f"export to {reader}: it reads ffn_mult only, not {sizes}")
    blocks, tensors = _layers(child, zero_attention=bool(check(child.config, reader)))
    config = _config(child, blocks, reader, sizes)
    if reader == "mlx-lm":
        tensors = [_renamed(tensor) for tensor in tensors]
    with whole_folder(target, child) as folder:
        write_config(folder, config)
        shutil.copyfile(_CONFIGURATION, folder / _CONFIGURATION.name)
        write_shards(folder, outer_tensors(child) + tensors, max_shard_bytes)
        copy_extra_files(child, folder)
    return target


def block_config(block: Block, config: PuzzleConfig, ffn_sizes: FFNSizes) -> Block:
    """An entry of `PuzzleConfig.blocks` in DeciLM's words; readers refuse keys that they do not know."""
    attention, ffn = block["attention"], block["ffn"]
    own_attention = attention["kind"] == "gqa"
    entry: dict[str, Any] = {"no_op": ffn["kind"] == "none", "replace_with_linear": ffn["kind"] == "linear"}
    if ffn["kind"] == "gated" and ffn_sizes == "intermediate_size":
        entry["intermediate_size"] = ffn["intermediate_size"]
    elif ffn["kind"] == "gated":
        entry["ffn_mult"] = ffn_mult(ffn["intermediate_size"], config.hidden_size)
    elif ffn_sizes == "ffn_mult":
        entry["ffn_mult"] = None  # llama.cpp's converter asks for the key
    heads_in_group = config.num_attention_heads // attention["num_key_value_heads"] if own_attention else None
    return {
        "attention": {
            "no_op": attention["kind"] == "none",
            "replace_with_linear": attention["kind"] == "linear",
            "n_heads_in_group": heads_in_group,
        },
        "ffn": entry,
    }


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier that readers turn into `width`: 2/3 of it times the hidden size, rounded up to 256."""
    multiplier = round(1.5 * width / hidden_size, 6)  # mlx-lm rounds to so many digits
    found = -(-int(2 * multiplier * hidden_size / 3) // _MULTIPLE) * _MULTIPLE
    if found != width:
        raise PuzzleError(
            f"export to deci: ffn_mult cannot express the FFN width {width} (readers would take {found}); "
            f"use intermediate_size, or widths that are multiples of {_MULTIPLE}"
        )
    return multiplier


def _config(child: ChildFiles, blocks: list[Block], reader: DeciReader, ffn_sizes: FFNSizes) -> dict[str, Any]:
    config = child.config
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIGURATION.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(blocks),
        **{name: getattr(config, name) for name in _COPIED_FIELDS},
        **_rope(config, reader),
        "torch_dtype": _TORCH_DTYPES[child.dtype("model.embed_tokens.weight")],
        "block_configs": [block_config(block, config, ffn_sizes) for block in blocks],
    }


def _rope(config: PuzzleConfig, reader: DeciReader) -> dict[str, Any]:
    """`rope_parameters` for transformers 5; for others what it was called before, of which transformers 5 warns."""
    parameters = dict(config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
    if reader == "deci":
        return {"rope_parameters": parameters}
    theta = parameters.pop("rope_theta")
    scaling = {} if parameters.get("rope_type", "default") == "default" else {"rope_scaling": parameters}
    return {"rope_theta": theta} | scaling


def _layers(child: ChildFiles, *, zero_attention: bool) -> tuple[list[Block], list[Stored]]:
    """The layers that are not empty and their tensors; on request the first gets an attention that adds nothing."""
    all_blocks = child.config.blocks or []
    kept = [(layer, block) for layer, block in enumerate(all_blocks) if not is_empty(block)]
    if not kept:
        raise PuzzleError("export to deci: all layers are empty; there is nothing to serve")
    blocks = [block for _, block in kept]
    tensors = [tensor for new, (layer, _) in enumerate(kept) for tensor in layer_tensors(child, layer, new)]
    if zero_attention:
        blocks[0] = blocks[0] | {"attention": {"kind": "gqa", "num_key_value_heads": 1}}
        tensors = _zero_attention(child) + tensors
    return blocks, tensors


def _zero_attention(child: ChildFiles) -> list[Stored]:
    config, dtype = child.config, child.dtype("model.embed_tokens.weight")
    assert config.head_dim is not None
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    shapes = {"q": (inner, hidden), "k": (config.head_dim, hidden), "v": (config.head_dim, hidden)}
    shapes["o"] = (hidden, inner)
    named: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": shape for name, shape in shapes.items()}
    if config.attention_bias:
        named |= {f"{name}_proj.bias": shape[:1] for name, shape in shapes.items()}
    zeros = [_filled(f"model.layers.0.self_attn.{name}", shape, dtype, 0.0) for name, shape in named.items()]
    return [_filled("model.layers.0.input_layernorm.weight", (hidden,), dtype, 1.0), *zeros]


def _filled(name: str, shape: tuple[int, ...], dtype: str, value: float) -> Stored:
    return Stored(name, shape, dtype, lambda: torch.full(shape, value, dtype=getattr(torch, _TORCH_DTYPES[dtype])))


def _renamed(tensor: Stored) -> Stored:
    name = tensor.name
    for ours, theirs in _MLX_NAMES:
        name = name.replace(ours, theirs)
    return Stored(name, tensor.shape, tensor.dtype, tensor.make)
