"""Variants: the alternatives of a subblock, as small frozen values; and the registry of their kinds.

A kind of variant says everything that Puzzle asks of it, and is one file: docs/adding-a-variant.md.
"""

import builtins
import inspect
import re
import symtable
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from puzzle.errors import PuzzleError
from puzzle.modeling import MODULE_NAMES, MODULES, OWN_NORMS, PuzzleConfig, PuzzleDecoderLayer, family_form, first_layer
from puzzle.recipe import GGMLType, LibrarySettings
from puzzle.variants.least_squares import rank_channels

Subblock = Literal["attention", "ffn"]
SUBBLOCKS: tuple[Subblock, Subblock] = ("attention", "ffn")
State = dict[str, Tensor]
"""A subblock's tensors by their names in the layer, e.g. `self_attn.q_proj.weight`, its norm included."""


@dataclass(frozen=True, kw_only=True)
class ParentSubblock:
    """What a variant starts from: one subblock of one layer of the parent, and its calibration moments."""

    config: PuzzleConfig
    variant: "Variant"
    state: State
    statistics: State
    """Moments from calibration, see `puzzle.library.statistics`."""
    settings: LibrarySettings = field(default_factory=LibrarySettings)
    """`start` and `channels` say by which formulas variants start."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.state.values())).dtype

    @property
    def norm(self) -> State:
        """The tensors of the norm before another module in its place: the parent's, or those of a norm of its own."""
        before, _ = family_form(self.config)[self.variant.subblock]
        if before is None:
            ones = torch.ones(self.config.hidden_size, dtype=self.dtype, device=next(iter(self.state.values())).device)
            return {f"{OWN_NORMS[self.variant.subblock]}.weight": ones}
        return {name: tensor for name, tensor in self.state.items() if name.split(".")[0] == before}

    @cached_property
    def channels(self) -> Tensor:
        """Ranking of an FFN's channels: a narrower FFN keeps the first ones, so that widths nest. [I]"""
        down_DI = self.state[f"{self.variant.output_projection(self.config)}.weight"]
        return rank_channels(down_DI, self.statistics, iterative=self.settings.channels == "iterative")


@dataclass(frozen=True)
class Variant(ABC):
    """One alternative for a subblock. A kind is a frozen dataclass; its fields, if any, are its sizes."""

    subblock: ClassVar[Subblock]
    kind: ClassVar[str]
    """What `PuzzleConfig.blocks` calls it."""
    grammar: ClassVar[str]
    """Of its names: `kv{num_key_value_heads}[win{window}][s{sinks}]`. Parts in brackets are left out at defaults."""
    module: ClassVar[type[nn.Module] | None] = None
    """The class of its module, where that is not the family's own: built as `module(config, entry)`, and copied into
    checkpoints, so it may use nothing but torch, nn, Tensor and Any."""
    closed_form: ClassVar[bool] = False
    """Whether its start is the optimum of the BLD loss, so that it is not trained."""
    absent: ClassVar[bool] = False
    """Whether it is a subblock left out."""
    setting: ClassVar[str | None] = None
    """The setting of the recipe's section `space` that lists its sizes; None: there is none."""
    type: str = field(default="", kw_only=True)
    """Of its matrices in a GGUF file, such as `q4_0`: a twin of the variant without; empty: the scenario's dtype."""

    @property
    def name(self) -> str:
        """Short and unique within its subblock: `kv2`, `w512`, `linear`, `none`."""
        sizes = self.entry()

        def part(match: re.Match[str]) -> str:
            return f"{match[1]}{sizes[match[2]]}" if match[2] in sizes else ""

        name = re.sub(r"\[?([^][{}]+)\{(\w+)\}\]?", part, self.grammar)
        return f"{name}@{self.type}" if self.type else name

    def shared_by(self, ranks: int) -> bool:
        """Whether vLLM can share it equally among so many GPUs; it repeats KV heads that are fewer."""
        size, queries = self.size or ranks, self.entry().get("num_attention_heads") or ranks
        return queries % ranks == 0 and (size % ranks == 0 or (self.subblock == "attention" and ranks % size == 0))

    @property
    def untyped(self) -> Self:
        """The same before its matrices are rounded to a type."""
        return replace(self, type="")

    def entry(self) -> dict[str, Any]:
        """Its entry in `PuzzleConfig.blocks`: its kind, and its sizes but for those at their defaults."""
        sizes = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {"kind": self.kind} | {name: size for name, (size, default) in sizes.items() if size != default}

    @property
    def size(self) -> int | None:
        """Its main size: KV heads, width, rank; None for a kind without sizes."""
        return next((getattr(self, field.name) for field in fields(self) if field.name != "type"), None)

    # Sizes and work, all of one subblock with its norm and biases.

    def build(
        self, config: PuzzleConfig, state: Mapping[str, Tensor] | None = None, layer: int | None = None
    ) -> PuzzleDecoderLayer:
        """Layer `layer` with this subblock alone, with the weights of `state` (shared, not copied), or on `meta`.

        Without a layer, as where only shapes are asked for, the first one that has this kind in the parent, or any.
        """
        assert state is None or config._attn_implementation is not None, "build a model with this configuration first"
        with torch.device("meta"):
            block = {"attention": {"kind": "none"}, "ffn": {"kind": "none"}, self.subblock: self.entry()}
            layer = first_layer(config, self.subblock, self.kind) if layer is None else layer
            built = PuzzleDecoderLayer(config, block, layer, cache_index=0)
        if state is not None:
            built.load_state_dict(dict(state), assign=True)
        return built.eval()

    def shapes(self, config: PuzzleConfig) -> dict[str, torch.Size]:
        """Of its parameters, by their names in the layer."""
        return {name: parameter.shape for name, parameter in self.build(config).named_parameters()}

    def num_params(self, config: PuzzleConfig) -> int:
        return sum(shape.numel() for shape in self.shapes(config).values())

    def weight_bytes(self, config: PuzzleConfig, dtype: torch.dtype) -> int:
        """Bytes of its parameters when the model is held in `dtype`; of a twin exactly those of its GGUF tensors."""
        if not self.type:
            return self.num_params(config) * dtype.itemsize
        return sum(type_bytes(shape, self.type) for shape in self.shapes(config).values())

    def typed(self, config: PuzzleConfig, type: str) -> Self | None:
        """Its twin of a type; None where rows of a matrix are no whole blocks of it, or there is none to round."""
        matrices = [shape for shape in self.shapes(config).values() if len(shape) > 1]
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
        fits = matrices and all(len(shape) == 2 and shape[1] % block == 0 for shape in matrices)
        return replace(self, type=type) if fits else None

    def idle_params(self, config: PuzzleConfig) -> int:
        """How many of its parameters a token does not use: those of experts that it is not sent to."""
        return 0

    def kv_bytes(self, config: PuzzleConfig, tokens: int, dtype: torch.dtype, beyond_window: int = 0) -> int:
        """Bytes of the keys and values cached for one sequence of `tokens`; `beyond_window` as of `Engine`."""
        return 0

    def operations(self, config: PuzzleConfig, new: int, context: int) -> float:
        """Floating-point operations for the last `new` of a sequence's `context` tokens: two for each multiply-add."""
        return 2.0 * (self.num_params(config) - self.idle_params(config)) * new

    def output_projection(self, config: PuzzleConfig) -> str | None:
        """The linear module it ends with, such as `mlp.down_proj`: updated by least squares after training."""
        return None

    def recorded(self, config: PuzzleConfig) -> str | None:
        """As the parent variant: the linear module of whose inputs calibration records the moments."""
        return None

    def recorded_values(self, config: PuzzleConfig) -> int:
        """Values of the second moment of what enters `recorded`."""
        recorded = self.recorded(config)
        return 0 if recorded is None else self.shapes(config)[f"{recorded}.weight"][1] ** 2

    # Its place among the alternatives.

    @abstractmethod
    def fits(self, parent: "Variant", config: PuzzleConfig) -> bool:
        """Whether it is a smaller alternative to the layer's parent variant."""

    def alternatives(self, config: PuzzleConfig, sizes: Sequence[int] | None = None) -> "list[Variant]":
        """Of a parent variant, the same kind in these sizes, the largest first; None: those that `space` derives."""
        return []

    @property
    def cell(self) -> str:
        """Its row in the table of what engines can run (`puzzle.engines.capability`, docs/engines.md)."""
        return "other kinds"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        """Its part of an entry of DeciLM's `block_configs`, without the keys that are false; None: not expressible."""
        return None

    # Its weights.

    @abstractmethod
    def initialise(self, parent: ParentSubblock) -> State:
        """The variant's weights before any training, in the parent's dtype."""

    def widen(self, state: State, wider: "Variant", config: PuzzleConfig) -> State | None:
        """Weights of the larger variant `wider` that compute the same function as `state`; None: there are none."""
        return None

    def linear_map(self, state: State, config: PuzzleConfig) -> tuple[Tensor, Tensor | None] | None:
        """As the parent variant: weight [D, D] and bias [D] of the map that replaces it (paper appendix A); float64."""
        return None

    def __str__(self) -> str:
        return self.name


def type_bytes(shape: torch.Size, type: str) -> int:
    """Of a tensor in a GGUF file: rows of blocks if it is a matrix, else float32."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
    return shape.numel() // block * size if len(shape) > 1 else 4 * shape.numel()


def add_sum(sums: State, name: str, value: Tensor) -> None:
    """Add to a sum that is kept in float64."""
    sums[name] = sums[name].add_(value) if name in sums else value.double()


class Axis(NamedTuple):
    """Where a tensor has its parts for each unit of a variant's main size, such as the rows of a channel."""

    dim: int
    start: int
    """Entries before them, which are of no unit: the queries of a joint matrix of queries, keys and values."""
    length: int
    """Entries of all units."""
    blocks: int
    """Runs over all units, one after another: 2 in a joint matrix of gate and up."""
    units: int

    def mapped(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor with `change` applied to its parts, [blocks, units, ...]."""
        moved = tensor.movedim(self.dim, 0)
        end = self.start + self.length
        parts = moved[self.start : end].unflatten(0, (self.blocks, self.units, -1))
        changed = change(parts).flatten(0, 2)
        return torch.cat([moved[: self.start], changed, moved[end:]]).movedim(0, self.dim).contiguous()


def axes(
    variant: Variant, doubled: Variant, config: PuzzleConfig, units: int, entries: int = 1, *, first: bool = False
) -> dict[str, Axis]:
    """The tensors that have a part for each of a variant's units, of which `doubled` has twice as many.

    Args:
        entries: in a row a unit. first: whether units come before what is of none, not after it.
    """
    found, others = {}, doubled.shapes(config)
    for name, shape in variant.shapes(config).items():
        for dim, (length, its) in enumerate(zip(shape, others[name], strict=True)):
            if of_units := its - length:
                start = 0 if first else length - of_units
                found[name] = Axis(dim, start, of_units, max(1, of_units // units // entries), units)
    return found


def split_state(layer_state: Mapping[str, Tensor], subblock: Subblock, config: PuzzleConfig) -> State:
    """The tensors of one subblock, its norms included, out of a whole layer's."""
    parts = {MODULE_NAMES[subblock], OWN_NORMS[subblock], *family_form(config)[subblock]}
    return {name: tensor for name, tensor in layer_state.items() if name.split(".")[0] in parts}


V = TypeVar("V", bound=Variant)
REGISTRY: dict[Subblock, dict[str, type[Variant]]] = {"attention": {}, "ffn": {}}
_CARRIED = {"torch", "nn", "Tensor", "Any"}
"""Names that a module's class may use: those that `modeling_puzzle.py` imports in every checkpoint."""


def register(variant: type[V]) -> type[V]:
    """Add a kind of variant; a decorator. The same kind from an earlier import of its module is replaced.

    Raises:
        PuzzleError: another class has its kind, or its module's class cannot be copied into checkpoints.
    """
    known = REGISTRY[variant.subblock].get(variant.kind)
    if known is not None and known.__qualname__ != variant.__qualname__:
        raise PuzzleError(f"register: {variant.subblock} kind {variant.kind!r} is taken; name yours differently")
    if variant.module is not None:
        if wrong := _wrong(variant.module):
            raise PuzzleError(f"register: {variant.module.__name__} {wrong}")
        MODULES[variant.subblock, variant.kind] = variant.module
    REGISTRY[variant.subblock][variant.kind] = variant
    return variant


def parse_variant(subblock: Subblock, name: str) -> Variant:
    """`kv2` or `w512`, or a kind without sizes: `linear`, `none`; `w512@q4_0`; a `PuzzleError` for anything else."""
    whole, (name, rounded, type) = name, name.partition("@")
    for kind in REGISTRY[subblock].values() if not rounded or type in get_args(GGMLType) else ():
        pattern = kind.grammar.replace("[", "(?:").replace("]", ")?")
        if match := re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[1-9][0-9]*)", pattern), name):
            with suppress(ValueError):  # sizes that no variant of this kind has
                sizes: dict[str, Any] = {field: int(size) for field, size in match.groupdict().items() if size}
                return kind(**sizes, type=type)
    forms = ", ".join(re.sub(r"\{\w+\}", "<number>", kind.grammar) for kind in REGISTRY[subblock].values())
    raise PuzzleError(f"{subblock} variant {whole!r} is unknown; use {forms}")


def variant_from_entry(subblock: Subblock, entry: Mapping[str, Any]) -> Variant:
    """The variant that an entry of `PuzzleConfig.blocks` has for this subblock."""
    if (kind := REGISTRY[subblock].get(entry["kind"])) is None:
        use = f"use {', '.join(REGISTRY[subblock])}, or import the module that registers it"
        raise PuzzleError(f"blocks: {subblock} kind {entry['kind']!r} is unknown; {use}")
    return kind(**{name: size for name, size in entry.items() if name != "kind"})


def _wrong(module: type[nn.Module]) -> str:
    """Why the class cannot stand in another file that imports `_CARRIED` alone; empty if it can."""
    try:
        source = textwrap.dedent(inspect.getsource(module))
    except (OSError, TypeError):
        return "has no source that a checkpoint could carry; write it to a file"
    used = _globals(symtable.symtable(source, module.__name__, "exec"))
    if foreign := ", ".join(sorted(used - _CARRIED - set(dir(builtins)))):
        return f"uses {foreign}, but a checkpoint carries the class alone; use {', '.join(sorted(_CARRIED))} only"
    if "Attention" in module.__name__:  # transformers then sets the attention implementation of no part of the model
        return "says Attention in its name, which stands for attention of transformers; name it differently"
    return ""


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Names that a piece of source takes from outside it."""
    names = {name.get_name() for name in table.get_symbols() if name.is_global() and not name.is_assigned()}
    return names.union(*map(_globals, table.get_children()))
