"""What a person writes: one short YAML file, validated as a whole before anything is loaded.

Everything but `execution` changes results and is part of the addresses of what it affects.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from puzzle.units import Bytes, Count, CountAmount, Fraction, Milliseconds, Speed


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class DataSettings(Section):
    """The text that calibration, training, scoring and tests use."""

    source: str | list[str]
    """Files or folders (.txt, .py, .md, .jsonl, .parquet), or a Hugging Face dataset, `name:config:split`."""
    column: str = "text"
    """Of jsonl, parquet and datasets: plain text, or a list of messages, which goes through the chat template."""
    sequence_length: Count = 2048
    """Tokens a sequence."""
    max_tokens: Count | None = None
    """Stop tokenising after so many."""
    calibration: Fraction = 0.05
    """Shares of the text, by document. What is left is for training."""
    validation: Fraction = 0.03
    scoring: Fraction = 0.03
    test: Fraction = 0.04


class SpaceSettings(Section):
    """Which alternatives are built. Sizes left out are derived from the model."""

    kv_heads: list[int] | None = None
    """Numbers of KV heads below the parent's; default: halvings."""
    ffn_widths: list[int] | None = None
    """Intermediate sizes below the parent's; default: 87, 75, 50, 25, 20 and 10 %, rounded."""
    attention: list[Literal["linear", "none"]] = ["linear", "none"]
    ffn: list[Literal["linear", "none"]] = ["linear", "none"]


class CalibrationSettings(Section):
    """Statistics of the parent's activations that variants start from."""

    tokens: Count = 500_000


class LibrarySettings(Section):
    """Blockwise local distillation (BLD) of every variant."""

    tokens: Count = 1_000_000
    learning_rate: float = 1e-3
    batch_size: int = 8
    """Sequences a step."""
    validation_tokens: Count = 32_768


class ScoreSettings(Section):
    """Replace-1-block scores."""

    tokens: Count = 65_536


class ScenarioSettings(Section):
    """How the model will be served."""

    engine: Literal["torch"] = "torch"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_sizes: list[int] = [1]
    """Batch sizes the search may choose from."""
    prompt_tokens: int = 1024
    generated_tokens: int = 256


class CostSettings(Section):
    """How costs are measured."""

    repeats: int = 5
    """Interleaved rounds over all variants."""


class TargetSettings(Section):
    """Bounds on the child: absolute (`24GB`, `200ms`) or relative to the parent (`2x`, `80%`)."""

    throughput: Speed | None = None
    """At least: generated tokens per second."""
    memory: Bytes | None = None
    """At most: weights and KV cache."""
    latency: Milliseconds | None = None
    """At most: a whole request."""
    time_to_first_token: Milliseconds | None = None
    time_per_output_token: Milliseconds | None = None
    parameters: CountAmount | None = None


class SearchSettings(Section):
    """The mixed-integer program."""

    gap: float = 1e-6
    """Relative gap at which a solution counts as optimal."""
    time_limit_s: float = 60.0


class DistilSettings(Section):
    """Global knowledge distillation (GKD) of the child."""

    tokens: Count = 10_000_000
    learning_rate: float = 3e-4
    batch_size: int = 8
    warmup: Fraction = 0.05
    """Share of the steps."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    cosine_weight: float = 1.0
    kl_weight: float = 1.0


class EvaluateSettings(Section):
    """The final comparison on test text."""

    tokens: Count = 131_072
    uniform_baseline: bool = True
    """Also build, distil and measure a uniform child of the same speed."""


class ExecutionSettings(Section):
    """Where and how to execute; changes no result and is never hashed."""

    device: str = "auto"
    threads: int | None = None


class Recipe(Section):
    """A complete recipe."""

    parent: str
    """Folder of a Hugging Face checkpoint, or a hub name."""
    data: DataSettings
    precision: Literal["float32", "bfloat16"] = "float32"
    """In which the parent runs during calibration, BLD, scoring and GKD."""
    space: SpaceSettings = SpaceSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    library: LibrarySettings = LibrarySettings()
    score: ScoreSettings = ScoreSettings()
    scenario: ScenarioSettings = ScenarioSettings()
    cost: CostSettings = CostSettings()
    target: TargetSettings = TargetSettings()
    search: SearchSettings = SearchSettings()
    distil: DistilSettings = DistilSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    seed: int = 0
    execution: ExecutionSettings = Field(default=ExecutionSettings())

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None) -> "Recipe":
        """The recipe in a YAML file, with `overrides` (`{"target.throughput": "2x"}`) put in before it is validated."""
        import yaml

        raw = yaml.safe_load(path.read_text())
        for key, value in (overrides or {}).items():
            *sections, name = key.split(".")
            place = raw
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        return cls.model_validate(raw)

    def to_yaml(self) -> str:
        """What was given, defaults left out."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)
