"""Which children each engine can run, layer by layer; asked before anything is searched or written.

A reader is a format of `puzzle.export` as one engine reads it. What it can run is data here, a row for each
`Variant.cell`; tests/engines compare logits for each row, and docs/engines.md shows the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.variants import Architecture, LayerSpace, Space, Variant


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What one engine can run of one format."""

    engine: str
    runs: Mapping[str, str]
    """By `Variant.cell`: what is written instead, with the same result; empty: the subblock as it is."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Why a cell that is not in `runs` cannot run, where the format itself could express it."""
    limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of the whole model, `family`, `hidden_act` or `rope_type`: the values that can run."""
    one_window: bool = False
    """Whether all windows must have the same size."""

    def refusal(self, cell: str) -> str | None:
        """Why subblocks of this cell cannot run; None: they can."""
        return None if cell in self.runs else self.refuses.get(cell, "this format cannot express it")

    def refused_windows(self, attentions: Iterable[Variant]) -> list[str]:
        """Why windows of these sizes cannot run together: one reason, or none."""
        sizes = sorted({window for variant in attentions if (window := variant.entry().get("window"))})
        one = self.one_window and len(sizes) > 1
        return [f"windows of {', '.join(map(str, sizes))} tokens: {self.engine} runs one size"] if one else []


_SIZES = {"fewer KV heads": "", "narrower FFN": ""}
# What runs wherever the code in the checkpoint does.
_OWN_CODE = _SIZES | dict.fromkeys(
    ("linear attention", "no attention", "low-rank FFN", "linear FFN", "no FFN", "window", "other kinds"), ""
)
_NO_LINEAR = "vLLM's DeciLM has no linear replacements"

READERS: Mapping[str, Reader] = {
    "hf": Reader(engine="transformers, with the code in the checkpoint", runs=_OWN_CODE | {"window with sinks": ""}),
    "vllm": Reader(
        engine="vLLM's Transformers backend, with the hf checkpoint",
        runs=_OWN_CODE,
        refuses={"window with sinks": "vLLM's attention has no sinks"},
        one_window=True,
    ),
    "deci": Reader(
        engine="vLLM's own DeciLMForCausalLM",
        runs=_SIZES | {"no attention": "in the first layer: one KV head with zero weights", "no FFN": ""},
        refuses={"linear attention": _NO_LINEAR, "linear FFN": _NO_LINEAR},
        limits={"family": ("llama",), "hidden_act": ("silu",)},
    ),
    "gguf": Reader(
        engine="llama.cpp, architecture deci",
        runs={
            **_SIZES,
            "linear attention": "",
            "no attention": "in the first layer: a linear attention with zero weights",
            "no FFN": "an FFN of width 32 with zero weights",
        },
        limits={"family": ("llama",), "hidden_act": ("silu",), "rope_type": ("default", "linear", "llama3")},
    ),
}
"""By the names that `deploy` in a recipe takes: formats of `puzzle export --to`, and `vllm`, which reads `hf`."""

TIMED_AS: Mapping[str, str] = {"vllm": "vllm", "llama.cpp": "gguf"}
"""By a scenario's engine, the reader that is timed: the space is restricted to what it can run."""


def refusals(config: PuzzleConfig, name: str) -> list[str]:
    """Why the reader `name` cannot run the model: a reason each, layer by layer; empty if it can."""
    reader, blocks = READERS[name], Architecture.of(config).blocks
    values = {
        "family": config.base_model_type,
        "hidden_act": config.hidden_act,
        "rope_type": (config.rope_parameters or {}).get("rope_type", "default"),
    }
    found = [
        f"{what} {values[what]}: {reader.engine} runs {', '.join(allowed)}"
        for what, allowed in reader.limits.items()
        if values[what] not in allowed
    ]
    found += reader.refused_windows(block.attention for block in blocks)
    return found + [
        f"layer {layer}: {variant.subblock} {variant} ({variant.cell}): {reason}"
        for layer, block in enumerate(blocks)
        for variant in block.subblocks
        if (reason := reader.refusal(variant.cell)) is not None
    ]


def require(config: PuzzleConfig, name: str) -> None:
    """A `PuzzleError` with the first layer and the reason, if the reader `name` cannot run the model."""
    if found := refusals(config, name):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise PuzzleError(f"export to {name}: {found[0]}{more}; restrict the space by `deploy`, or export to hf")


def deployable(space: Space, config: PuzzleConfig, names: Sequence[str]) -> Space:
    """`space` without the variants that one of these readers cannot run.

    Raises:
        PuzzleError: a reader cannot run the parent itself, or needs windows of one size.
    """
    readers = [READERS[name] for name in names]
    for name in names:
        require(config, name)

    def kept(variants: Sequence[Variant]) -> tuple[Variant, ...]:
        return tuple(each for each in variants if all(reader.refusal(each.cell) is None for reader in readers))

    space = Space(tuple(LayerSpace(kept(layer.attention), kept(layer.ffn)) for layer in space.layers))
    for reader in readers:
        for found in reader.refused_windows(variant for layer in space.layers for variant in layer.attention):
            raise PuzzleError(f"space.attention: {found}")
    return space
