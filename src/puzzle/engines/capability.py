"""Which children each engine can run, layer by layer; asked before anything is searched or written.

A reader is a format of `puzzle.export` as one engine reads it. What it can run is data here, a row for each
`Variant.cell`; tests/engines compare logits for each row, and docs/engines.md shows the table.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, plain_shape, rotates
from puzzle.variants import Architecture, Space, Variant


@dataclass(frozen=True)
class Reader:
    """What one engine can run of one format.

    Attributes:
        runs: of every `Variant.cell`; docs/engines.md says where something else is written, with the same result.
        limits: of the whole model, by what `_facts` says of it: the values that can run.
        one_size: the cells of whose sizes, of windows or FFNs, it runs one in a model.
        types: whether matrices may be of the types of a GGUF file, which `hf` holds read back.
    """

    engine: str
    runs: frozenset[str]
    limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    one_size: frozenset[str] = frozenset()
    types: bool = False

    def can_run(self, variant: Variant) -> bool:
        return variant.cell in self.runs and (self.types or not variant.type)

    def refused_sizes(self, variants: Collection[Variant]) -> list[str]:
        """Why windows or FFNs of these sizes cannot run together."""
        windows = {window for variant in variants if (window := variant.entry().get("window"))}
        widths = {variant.size or 0 for variant in variants if variant.cell == "narrower FFN"}
        found = (("narrower FFN", "FFN widths", "channels", widths), ("window", "windows", "tokens", windows))
        return [
            f"{what} of {', '.join(map(str, sorted(sizes)))} {unit}: {self.engine} runs one size"
            for cell, what, unit, sizes in found
            if cell in self.one_size and len(sizes) > 1
        ]


_DECI = frozenset({"fewer KV heads", "narrower FFN", "no attention", "no FFN"})
# What runs wherever the code in the checkpoint does.
_OWN_CODE = _DECI | {"fewer query heads", "linear attention", "low-rank FFN", "linear FFN", "window", "other kinds"}
_QUERIES = _DECI | {"fewer query heads"}
_WIDTH = frozenset({"narrower FFN"})
_LLAMA_CPP: dict[str, tuple[str, ...]] = {
    "plain_shape": ("llama", "qwen3"),
    "hidden_act": ("silu",),
    "rope_type": ("default",),
    "biases": ("none",),
    "positions": ("in all layers",),
}
_LLAMA = {"plain_shape": ("llama",), "rope_type": ("default", "linear", "llama3"), "biases": ("none", "some")}
_QWEN3 = {"plain_shape": ("qwen3",), "head": ("tied",)}
_SOME_POSITIONS = {"positions": ("in all layers", "not in all layers")}

READERS: Mapping[str, tuple[Reader, ...]] = {
    "hf": (Reader("transformers, with the code in the checkpoint", _OWN_CODE | {"window with sinks"}, types=True),),
    "vllm": (Reader("vLLM's Transformers backend, with the hf checkpoint", _OWN_CODE, one_size=frozenset({"window"})),),
    "deci": (Reader("vLLM's own DeciLMForCausalLM", _DECI, {"family": ("llama",), "hidden_act": ("silu",)}),),
    "gguf": (
        Reader("llama.cpp, architecture openelm", _QUERIES, _LLAMA_CPP | _QWEN3, types=True),
        Reader("llama.cpp, architecture deci", _QUERIES | {"linear attention"}, _LLAMA_CPP | _LLAMA, types=True),
        Reader("llama.cpp, architecture step35", _QUERIES | {"window"}, _LLAMA_CPP, _WIDTH | {"window"}, types=True),
        Reader("llama.cpp, architecture step35", _QUERIES, _LLAMA_CPP | _SOME_POSITIONS, _WIDTH, types=True),
    ),
}
"""By the names that `deploy` in a recipe takes: formats of `puzzle export --to`, and `vllm`, which reads `hf`. Of
several readers the first that can run a model is its reader."""

TIMED_AS: Mapping[str, str] = {"vllm": "vllm", "llama.cpp": "gguf"}
"""By a scenario's engine, the reader that is timed: the space is restricted to what it can run."""


def _facts(config: PuzzleConfig) -> dict[str, str]:
    """What `Reader.limits` asks of a model."""
    rope, blocks = config.rope_parameters or {}, Architecture.of(config).blocks
    variants = {variant for block in blocks for variant in block.subblocks}
    biased = any(name.endswith(".bias") for variant in variants for name in variant.shapes(config))
    everywhere = all(rotates(config, layer) or block.attention.closed_form for layer, block in enumerate(blocks))
    return {
        "family": config.base_model_type,
        "plain_shape": plain_shape(config.base_model_type) or "neither",
        "hidden_act": config.hidden_act,
        "rope_type": "partial" if rope.get("partial_rotary_factor", 1) != 1 else rope.get("rope_type", "default"),
        "head": "tied" if config.tie_word_embeddings else "of its own",
        "biases": "some" if biased else "none",
        "positions": "in all layers" if everywhere else "not in all layers",
    }


def _refusals(config: PuzzleConfig, reader: Reader) -> tuple[list[str], list[str]]:
    """Why a reader cannot run the model: for what the parent is, and for the child's blocks."""
    facts, blocks = _facts(config), Architecture.of(config).blocks
    of_parent = [
        f"{what} {facts[what]}: {reader.engine} runs {', '.join(allowed)}"
        for what, allowed in reader.limits.items()
        if facts[what] not in allowed
    ]
    return of_parent, reader.refused_sizes([variant for block in blocks for variant in block.subblocks]) + [
        f"layer {layer}: {variant.subblock} {variant} ({variant.cell}): {reader.engine} cannot run it"
        for layer, block in enumerate(blocks)
        for variant in block.subblocks
        if not reader.can_run(variant)
    ]


def reader_of(config: PuzzleConfig, name: str) -> Reader:
    """Of the readers of this name the first that can run the model, or that lacks least for it."""
    return min(READERS[name], key=lambda reader: [len(reasons) for reasons in _refusals(config, reader)])


def refusals(config: PuzzleConfig, name: str) -> list[str]:
    """Why the reader `name` cannot run the model: a reason each, layer by layer; empty if it can."""
    return list(chain(*_refusals(config, reader_of(config, name))))


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

    def runs(variant: Variant) -> bool:
        of_widths = {variant.cell} - {"window"}
        return all(reader.can_run(variant) and not of_widths & reader.one_size for reader in readers)

    space = space.restricted(lambda _, variant: runs(variant))
    for reader in readers:
        for found in reader.refused_sizes([variant for layer in space.layers for variant in layer.attention]):
            raise PuzzleError(f"space.attention: {found}")
    return space
