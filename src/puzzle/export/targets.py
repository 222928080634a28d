"""What every format and the engines that read it support, as data.

An alternative is supported as it is (`yes`), written as something else that computes the same (`rewrite`), or not at
all (`no`); where a layer's position matters, each position has its own verdict. Where each entry comes from is in
docs/engines.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["yes", "rewrite", "no"]
Position = Literal["first", "middle", "last"]
POSITIONS: tuple[Position, ...] = ("first", "middle", "last")
Alternative = Literal[
    "kv heads", "window", "window with sinks", "linear attention", "no attention",
    "ffn width", "low-rank ffn", "linear ffn", "no ffn", "other kinds",
]  # fmt: skip


@dataclass(frozen=True)
class Support:
    """A verdict; of a rewrite what is written instead, of a no the reason."""

    verdict: Verdict
    note: str = ""


Cell = Support | Mapping[Position, Support]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One format as one engine reads it."""

    reader: str
    evidence: Literal["run", "read"]
    """Whether the engine ran such a model and logits were compared, or its source was read."""
    alternatives: Mapping[Alternative, Cell]
    """What is not named is not supported."""
    families: tuple[str, ...] | None = None
    """None: every family that this package has."""
    activations: tuple[str, ...] | None = None
    rope_types: tuple[str, ...] | None = None
    biases: bool = True
    """Of attention and FFN projections, if the parent has them."""
    own_head_dim: bool = True
    """Whether head_dim may differ from hidden_size / num_attention_heads."""
    width_multiple: int = 1
    """Of FFN widths."""
    one_window: bool = False
    """Whether all windows must be of one size."""


YES = Support("yes")


def _rewrite(note: str) -> Support:
    return Support("rewrite", note)


def _no(reason: str) -> Support:
    return Support("no", reason)


def _except_first(first: Support, others: Support = YES) -> Mapping[Position, Support]:
    return {"first": first, "middle": others, "last": others}


_SIZES: dict[Alternative, Cell] = {"kv heads": YES, "ffn width": YES}
_NO_SINKS = _no("its attention has no sinks, which the child's code says")
_NO_LINEAR = _no("the engine's DeciLM has no linear replacements")
_NO_WINDOW = _no("the engine's DeciLM has no windows")
_NO_LOW_RANK = _no("block_configs cannot describe it")

TARGETS: Mapping[str, Target] = {
    "hf": Target(
        reader="transformers, with the code in the checkpoint",
        evidence="run",
        alternatives=_SIZES
        | {"window": YES, "window with sinks": YES, "linear attention": YES, "no attention": YES}
        | {"low-rank ffn": YES, "linear ffn": YES, "no ffn": YES}
        | {"other kinds": _no("the code of a kind that was registered from outside is not in the checkpoint")},
    ),
    "vllm": Target(
        reader="vLLM, Transformers backend, with the hf checkpoint",
        evidence="run",
        one_window=True,
        alternatives=_SIZES
        | {"window": YES, "window with sinks": _NO_SINKS}
        | {"linear attention": YES, "no attention": YES, "low-rank ffn": YES, "linear ffn": YES, "no ffn": YES},
    ),
    "deci": Target(
        reader="vLLM's own DeciLMForCausalLM",
        evidence="run",
        families=("llama",),
        activations=("silu",),
        alternatives=_SIZES
        | {"window": _NO_WINDOW, "window with sinks": _NO_WINDOW, "linear attention": _NO_LINEAR}
        | {"no attention": _except_first(_rewrite("one KV head with zero weights: the first half must be attention"))}
        | {"low-rank ffn": _NO_LOW_RANK, "linear ffn": _NO_LINEAR, "no ffn": YES},
    ),
    "tensorrt-llm": Target(
        reader="TensorRT-LLM, PyTorch backend",
        evidence="read",
        families=("llama",),
        activations=("silu",),
        biases=False,
        width_multiple=256,
        alternatives=_SIZES
        | {"window": _NO_WINDOW, "window with sinks": _NO_WINDOW, "linear attention": YES, "no attention": YES}
        | {"low-rank ffn": _NO_LOW_RANK, "linear ffn": YES, "no ffn": YES},
    ),
    "mlx-lm": Target(
        reader="mlx-lm",
        evidence="read",
        families=("llama",),
        activations=("silu",),
        own_head_dim=False,
        width_multiple=256,
        alternatives=_SIZES
        | {"window": _NO_WINDOW, "window with sinks": _NO_WINDOW}
        | {"linear attention": _except_first(_no("the mask is made from layer 0's cache, which it leaves empty"))}
        | {"no attention": _except_first(_rewrite("one KV head with zero weights: the mask is from layer 0's cache"))}
        | {"low-rank ffn": _NO_LOW_RANK, "linear ffn": YES, "no ffn": YES},
    ),
    "gguf": Target(
        reader="llama.cpp, architecture deci",
        evidence="run",
        families=("llama",),
        activations=("silu",),
        rope_types=("default", "linear", "llama3"),
        alternatives=_SIZES
        | {
            "window": _no("llama.cpp's deci has no windows"),
            "window with sinks": _no("llama.cpp's deci has no windows"),
        }
        | {"linear attention": YES}
        | {"no attention": _except_first(_rewrite("a linear attention with zero weights: head sizes are row 0's"))}
        | {"low-rank ffn": _rewrite("an FFN whose gate is constant")}
        | {"linear ffn": _rewrite("a linear attention in a row of its own, or of the next layer without attention")}
        | {"no ffn": _rewrite("an FFN of width 32 with zero weights; a layer without attention too is left out")},
    ),
}
"""By the name that `puzzle export --to` and a recipe's `deploy` take."""
