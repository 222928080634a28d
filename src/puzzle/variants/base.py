"""Variants: the alternatives of a subblock, as small frozen values.

A variant knows its name, the entry it writes into `PuzzleConfig.blocks`, and how its weights start from the parent's
(`initialise`). How one is added: docs/adding-a-variant.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from puzzle.modeling import PuzzleConfig
from puzzle.variants.channels import rank_channels

Subblock = Literal["attention", "ffn"]
SUBBLOCKS: tuple[Subblock, Subblock] = ("attention", "ffn")
State = dict[str, Tensor]
"""A subblock's tensors by their names in the layer, e.g. `self_attn.q_proj.weight`, its norm included."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which of the formulas variants start by."""

    method: Literal["closed_form", "paper"] = "closed_form"
    """Least squares on calibration statistics; or slices, means and products of weights (paper appendix A)."""
    kv_heads: Literal["mean", "importance"] = "mean"
    channels: Literal["iterative", "independent"] = "iterative"


@dataclass(frozen=True, kw_only=True)
class ParentSubblock:
    """What a variant starts from: one half of one layer of the parent, and what calibration saw of it."""

    config: PuzzleConfig
    variant: "Variant"
    state: State
    statistics: State
    """Moments from calibration, see `puzzle.library.statistics`."""
    start: Start = Start()

    @cached_property
    def channels(self) -> Tensor:
        """Of a gated FFN, its channels, those that narrower ones keep first: one ranking, so widths nest. [I]"""
        return rank_channels(
            self.state["mlp.down_proj.weight"],
            self.statistics["activation_mean_abs"],
            self.statistics["activation_second_moment"],
            knowing_the_gone=self.start.channels == "iterative",
            with_refit=self.start.method == "closed_form",
        )


class Variant(ABC):
    """One alternative for a subblock."""

    subblock: ClassVar[Subblock]
    kind: ClassVar[str]
    closed_form: ClassVar[bool]
    """Whether its closed-form start is the optimum of the loss on its own contribution: nothing is left to train."""
    output_projection: ClassVar[str | None] = None
    """The linear module it ends with, such as `mlp.down_proj`: refitted by least squares; None: has none."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short and unique within its subblock: `kv2`, `w512`, `linear`, `none`."""

    @abstractmethod
    def module_config(self) -> dict[str, Any]:
        """This variant's entry in `PuzzleConfig.blocks`."""

    @classmethod
    @abstractmethod
    def form(cls) -> str:
        """What its names look like, for error messages: `w<number>`."""

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """The variant that `name` names; None if that is no name of this kind."""

    @classmethod
    @abstractmethod
    def from_config(cls, entry: dict[str, Any]) -> Self:
        """Back from `module_config`."""

    @abstractmethod
    def fits(self, own: "Variant", config: PuzzleConfig) -> bool:
        """Whether it is a smaller alternative to a layer's own variant of this subblock."""

    @abstractmethod
    def initialise(self, parent: ParentSubblock) -> State:
        """The variant's weights before any training, in the parent's dtype."""

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        """E||y - y'||^2 / E||y||^2 of these weights on the calibration text, where its moments alone tell."""
        return None

    def kv_values(self, config: PuzzleConfig, tokens: int) -> int:
        """Keys and values cached for a sequence of `tokens`."""
        return 0

    @property
    def cell(self) -> str:
        """Its row in the table of what engines can run (`puzzle.engines.capability`, docs/engines.md)."""
        return "other kinds"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        """Its half of an entry of DeciLM's `block_configs`, without the keys that are false; None: not expressible."""
        return None

    def widen(self, state: State, wider: "Variant", config: PuzzleConfig) -> State | None:
        """`state` as weights of the larger variant `wider` that computes the same; None where there is no such form."""
        return None

    def __str__(self) -> str:
        return self.name


class Unsized(Variant):
    """A variant without sizes: its kind is its name."""

    @property
    def name(self) -> str:
        return self.kind

    def module_config(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def form(cls) -> str:
        return cls.kind

    @classmethod
    def parse(cls, name: str) -> Self | None:
        return cls() if name == cls.kind else None

    @classmethod
    def from_config(cls, entry: dict[str, Any]) -> Self:
        return cls()


class Nothing(Unsized):
    """A subblock that is left out: no parameters, no norm."""

    kind: ClassVar[str] = "none"
    closed_form: ClassVar[bool] = True

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return own != self

    def initialise(self, parent: ParentSubblock) -> State:
        return {}

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return 1.0

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"no_op": True}
