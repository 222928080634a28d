"""Operations and bytes that follow from a recipe and the shapes of a parent.

A forward pass takes two operations a parameter and token, a backward pass four; attention besides four for every pair
of a query and a key it sees, subblock of all pairs of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.recipe import Recipe
from puzzle.variants import BlockVariant, GatedFFN, GroupedQuery, LayerSpace, Space, Variant, num_params

KEPT_PER_PARAMETER = 4
"""Bytes of a variant, and of a child, on disk: float32."""
STATE_PER_PARAMETER = 12
"""Bytes of a training state on disk: weight and two moments."""
_PROPOSALS = 4
"""Architectures that a corrected search offers at once."""


@dataclass(frozen=True)
class Work:
    """What a recipe asks for, stage by stage.

    D hidden size, I FFN channels, V vocabulary.
    """

    recipe: Recipe
    config: PuzzleConfig
    space: Space

    @cached_property
    def num_params(self) -> int:
        """Of the parent, tied ones counted once."""
        return sum(parameter.numel() for parameter in empty_model(self.config).parameters())

    @cached_property
    def layer_params(self) -> list[int]:
        """Of the parent's own blocks."""
        return [self._params(layer.parent.attention) + self._params(layer.parent.ffn) for layer in self.space.layers]

    @property
    def outer_params(self) -> int:
        """Embeddings, final norm and an untied head."""
        return self.num_params - sum(self.layer_params)

    @cached_property
    def students(self) -> list[int]:
        """Parameters that BLD trains, by layer."""
        return [
            sum(self._params(variant) for variant in alternatives(layer) if not variant.closed_form)
            for layer in self.space.layers
        ]

    @property
    def variants(self) -> int:
        """Parameters of the whole library."""
        return sum(self._params(variant) for layer in self.space.layers for variant in alternatives(layer))

    @property
    def children(self) -> int:
        """How many are made: the child, and the uniform one beside it."""
        return 2 if self.recipe.evaluate.uniform_baseline else 1

    def layer_forward(self, layer: int) -> float:
        """Operations a token of one of the parent's layers."""
        attention = self.space.layers[layer].parent.attention
        pairs = 0.0
        if isinstance(attention, GroupedQuery):
            assert self.config.head_dim is not None
            width = self.config.num_attention_heads * self.config.head_dim
            pairs = 4.0 * width * self.recipe.data.sequence_length / 2
        return 2.0 * self.layer_params[layer] + pairs

    @property
    def head_forward(self) -> float:
        """Operations a token of the head."""
        return 2.0 * self.config.vocab_size * self.config.hidden_size

    @cached_property
    def forward(self) -> float:
        """Operations a token of the whole parent."""
        return self.suffix(0)

    def suffix(self, layer: int) -> float:
        """Operations a token of the layers from `layer` on, and of the head."""
        layers = range(layer, len(self.space.layers))
        return sum(self.layer_forward(after) for after in layers) + self.head_forward

    def moments(self, layer: int) -> float:
        """Operations a token of the moments of a layer: one of I x I, and four of D x D."""
        ffn = self.space.layers[layer].parent.ffn
        channels = ffn.intermediate_size if isinstance(ffn, GatedFFN) else 0
        return 2.0 * channels**2 + 8.0 * self.config.hidden_size**2

    def moment_bytes(self, layer: int) -> int:
        """Of their sums: float64, and float32 of the largest."""
        ffn = self.space.layers[layer].parent.ffn
        channels = ffn.intermediate_size if isinstance(ffn, GatedFFN) else 0
        return 32 * self.config.hidden_size**2 + 4 * channels**2

    def scoring(self, layer: int) -> float:
        """Operations of a layer's scores: what comes after it and the head, for every block's share of the text."""
        tokens = sum(
            self._scored_tokens(block, self.space.layers[layer]) for block in self.space.layers[layer].blocks()
        )
        return tokens * self.suffix(layer + 1)

    def _scored_tokens(self, block: BlockVariant, layer: LayerSpace) -> float:
        """Blocks with both subblocks replaced are estimated from a share of the text."""
        settings, own = self.recipe.score, layer.parent
        composed = block.attention != own.attention and block.ffn != own.ffn
        estimated = composed and settings.composed == "estimated" and settings.race is not None
        return settings.tokens * (settings.race or 1.0 if estimated else 1.0)

    @property
    def comparing(self) -> float:
        """Operations of whole architectures that `correct` compares, at most: of the parent's size, and with all blocks
        scored again in every round.

        A round scores 15 to 40 % of them (docs/scaling.md). A block takes the layers from its own on, as the others are
        shared; pairs ask for few proposals in between.
        """
        settings, layers = self.recipe.correct, self.space.layers
        if not self.recipe.corrected:
            return 0.0
        removed = min(settings.depth, len(layers))
        rounds = settings.rounds + removed + (settings.pairs > 0)
        again = sum((rounds * len(layer.blocks()) + removed) * self.suffix(place) for place, layer in enumerate(layers))
        whole = 2 + settings.pool + settings.pairs + _PROPOSALS * rounds  # 2: the parent, and the search's own
        return settings.tokens * (again + whole * self.forward)

    @property
    def finalists(self) -> list[tuple[int, int]]:
        """Finalists and the GKD tokens of each, round after round: half of them go on, with twice the tokens."""
        settings = self.recipe.correct
        left, tokens, rounds = settings.finalists if self.recipe.corrected else 0, settings.finalist_tokens, []
        while left > 1:
            rounds.append((left, tokens))
            left, tokens = left // 2, 2 * tokens
        return rounds

    @property
    def finalist_tokens(self) -> int:
        """GKD tokens of all finalists together."""
        return sum(count * tokens for count, tokens in self.finalists)

    @property
    def operations(self) -> dict[str, float]:
        """Of the stages that run models, on one device that holds the parent."""
        recipe, layers = self.recipe, range(len(self.space.layers))
        training = 4.0 * self.forward  # the child's forward and backward pass, and the parent's forward pass
        return {
            "calibrate": (self.forward + sum(map(self.moments, layers))) * recipe.calibration.tokens,
            "library": (self.forward + 6.0 * sum(self.students)) * recipe.library.tokens,
            "score": sum(map(self.scoring, layers)),
            "correct": self.comparing + training * self.finalist_tokens,
            "refine": training * recipe.refine.tokens * self.children,
            "distil": training * recipe.distil.tokens * self.children,
            "evaluate": 2 * self.forward * recipe.evaluate.tokens * (self.children + 2),
        }

    def disk_bytes(self, in_training: Sequence[int]) -> int:
        """Statistics, library with the training state of the layers in flight, and the children and finalists: as they
        are put together, refined, and after GKD with the best weights and the training state; the parent's outputs if
        cached.

        Args:
            in_training: layers in flight at a time.
        """
        recipe = self.recipe
        models = self.children * (4 if recipe.refine.tokens else 3) + 3 * sum(count for count, _ in self.finalists)
        kept = KEPT_PER_PARAMETER * (self.variants + models * self.num_params)
        states = STATE_PER_PARAMETER * (sum(self.students[layer] for layer in in_training) + self.num_params)
        moments = sum(self.moment_bytes(layer) for layer in range(len(self.space.layers)))
        cached = 8 * recipe.distil.tokens * (recipe.distil.teacher_cache or 0)  # a token and its log-probability
        return kept + states + moments + cached

    def _params(self, variant: Variant) -> int:
        return num_params(variant, self.config)


def alternatives(layer: LayerSpace) -> tuple[Variant, ...]:
    """What a layer may take beside its own."""
    return (*layer.attention[1:], *layer.ffn[1:])
