"""Which children each engine can run, layer by layer; asked before anything is searched or written.

A reader is a format of `puzzle.export` as one engine reads it. What it can run is data here, a row for each
`Variant.cell`; tests/engines compare logits for each row, and docs/engines.md shows the table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, plain_shape
from puzzle.variants import Architecture, Space, Variant


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What one engine can run of one format."""

    engine: str
    runs: frozenset[str]
    """Of every `Variant.cell`; docs/engines.md says where something else is written, with the same result."""
    limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of the whole model, its `family`, `plain_shape`, `hidden_act`, `rope_type` or `head`: the values that can run."""
    one_window: bool = False
    """Whether all windows must have the same size."""

    def refused_windows(self, attentions: Iterable[Variant]) -> list[str]:
        """Why windows of these sizes cannot run together: one reason, or none."""
        sizes = sorted({window for variant in attentions if (window := variant.entry().get("window"))})
        one = self.one_window and len(sizes) > 1
        return [f"windows of {', '.join(map(str, sizes))} tokens: {self.engine} runs one size"] if one else []


_DECI = frozenset({"fewer KV heads", "narrower FFN", "no attention", "no FFN"})
# What runs wherever the code in the checkpoint does.
_OWN_CODE = _DECI | {"linear attention", "low-rank FFN", "linear FFN", "window", "other kinds"}

READERS: Mapping[str, Reader] = {
    "hf": Reader(engine="transformers, with the code in the checkpoint", runs=_OWN_CODE | {"window with sinks"}),
    "vllm": Reader(engine="vLLM's Transformers backend, with the hf checkpoint", runs=_OWN_CODE, one_window=True),
    "deci": Reader(
        engine="vLLM's own DeciLMForCausalLM", runs=_DECI, limits={"family": ("llama",), "hidden_act": ("silu",)}
    ),
    "gguf": Reader(
        engine="llama.cpp, architecture deci",
        runs=_DECI | {"linear attention"},
        limits={"plain_shape": ("llama",), "hidden_act": ("silu",), "rope_type": ("default", "linear", "llama3")},
    ),
}
OPENELM = Reader(
    engine="llama.cpp, architecture openelm",
    runs=_DECI,
    limits={"plain_shape": ("qwen3",), "hidden_act": ("silu",), "rope_type": ("default",), "head": ("tied",)},
)
"""The reader of a GGUF file of what is another spelling of Qwen3."""
"""By the names that `deploy` in a recipe takes: formats of `puzzle export --to`, and `vllm`, which reads `hf`."""

TIMED_AS: Mapping[str, str] = {"vllm": "vllm", "llama.cpp": "gguf"}
"""By a scenario's engine, the reader that is timed: the space is restricted to what it can run."""


def reader_of(config: PuzzleConfig, name: str) -> Reader:
    """The reader of this name; of GGUF files the one for the model's family."""
    return OPENELM if name == "gguf" and plain_shape(config.base_model_type) == "qwen3" else READERS[name]


def refusals(config: PuzzleConfig, name: str) -> list[str]:
    """Why the reader `name` cannot run the model: a reason each, layer by layer; empty if it can."""
    reader, blocks = reader_of(config, name), Architecture.of(config).blocks
    rope = config.rope_parameters or {}
    values = {
        "family": config.base_model_type,
        "plain_shape": plain_shape(config.base_model_type) or "neither",
        "hidden_act": config.hidden_act,
        "rope_type": "partial" if rope.get("partial_rotary_factor", 1) != 1 else rope.get("rope_type", "default"),
        "head": "tied" if config.tie_word_embeddings else "of its own",
    }
    found = [
        f"{what} {values[what]}: {reader.engine} runs {', '.join(allowed)}"
        for what, allowed in reader.limits.items()
        if values[what] not in allowed
    ]
    found += reader.refused_windows(block.attention for block in blocks)
    return found + [
        f"layer {layer}: {variant.subblock} {variant} ({variant.cell}): {reader.engine} cannot run it"
        for layer, block in enumerate(blocks)
        for variant in block.subblocks
        if variant.cell not in reader.runs
    ]


def require(config: PuzzleConfig, name: str) -> None:
    """A `PuzzleError` with the first layer and the reason, if the reader `name` cannot run the model."""
    if found := refusals(config, name):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise PuzzleError(f"export to {name}: {found[0]}{more}; restrict the space by `deploy`, or export to hf")


def deployable(space: Space, config: PuzzleConfig, names: Sequence[str]) -> Space:
    """`space` without the variants that one of these readers cannot run.

    A `PuzzleError` if one cannot run the parent itself, or needs windows of one size.
    """
    readers = [reader_of(config, name) for name in names]
    for name in names:
        require(config, name)
    space = space.restricted(lambda _, variant: all(variant.cell in reader.runs for reader in readers))
    for reader in readers:
        for found in reader.refused_windows(variant for layer in space.layers for variant in layer.attention):
            raise PuzzleError(f"space.attention: {found}")
    return space
