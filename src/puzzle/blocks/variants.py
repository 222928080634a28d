"""Variants: the alternatives of a subblock, as small frozen values.

A variant knows its name, the entry it writes into `PuzzleConfig.blocks`, and how its weights start from the parent's
(`initialise`). Adding one: a subclass in `attention.py` or `ffn.py`, and its entry in `registry.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from puzzle.modeling import PuzzleConfig

Half = Literal["attention", "ffn"]
State = dict[str, Tensor]
"""A subblock's tensors by their names in the layer, e.g. `self_attn.q_proj.weight`, its norm included."""


@dataclass(frozen=True, kw_only=True)
class ParentSubblock:
    """What a variant starts from: one half of one layer of the parent, and what calibration saw of it."""

    config: PuzzleConfig
    variant: "Variant"
    state: State
    statistics: State
    """Moments from calibration, see `puzzle.library.statistics`."""


class Variant(ABC):
    """One alternative for a subblock."""

    half: ClassVar[Half]
    kind: ClassVar[str]
    trained: ClassVar[bool]
    """Whether BLD trains it; a variant whose start is already the optimum of the BLD loss is not trained."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short and unique within its half: `kv2`, `w512`, `linear`, `none`."""

    @abstractmethod
    def module_config(self) -> dict[str, Any]:
        """This variant's entry in `PuzzleConfig.blocks`."""

    @abstractmethod
    def initialise(self, parent: ParentSubblock) -> State:
        """The variant's weights before any training, in the parent's dtype."""

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
