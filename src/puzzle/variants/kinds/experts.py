"""A mixture of experts as the parent has it: other numbers of experts are no alternatives yet."""

from dataclasses import dataclass

from puzzle.modeling import PuzzleConfig, family_config
from puzzle.variants.base import ParentSubblock, State, Variant, register


@register
@dataclass(frozen=True)
class Experts(Variant):
    """The family's mixture of experts, router and shared experts included."""

    subblock = "ffn"
    kind = "experts"
    grammar = "experts"

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return False

    def idle_params(self, config: PuzzleConfig) -> int:
        family = family_config(config)
        experts = [shape for name, shape in self.shapes(config).items() if ".experts." in name]
        names = ("num_experts_per_tok", "moe_k", "moe_topk")
        chosen = next(getattr(family, name) for name in names if hasattr(family, name))
        return sum(shape.numel() // shape[0] * (shape[0] - chosen) for shape in experts)

    def initialise(self, parent: ParentSubblock) -> State:
        return dict(parent.state)
