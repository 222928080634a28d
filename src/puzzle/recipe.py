"""The recipe: one short YAML file, validated as a whole before anything is loaded.

All sections but `execution` change results: they are part of the addresses of the stages that read them.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model, model_validator

from puzzle.errors import PuzzleError
from puzzle.explain import explain
from puzzle.given import parse_yaml, read_given
from puzzle.quantities import SETTINGS, Quantity, check_setting
from puzzle.units import Count, Fraction, Size, amount

EXAMPLE_SOURCE = "path/to/your/text"
"""What `puzzle init` writes in place of the user's text."""
PositiveInt = Annotated[int, Field(ge=1)]
PositiveCount = Annotated[Count, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[Fraction, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
GGMLType = Literal["q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "iq4_nl", "iq4_xs", "q4_1", "q4_0", "q3_K"]
"""Types of matrices in a GGUF file, as llama.cpp names them."""


def _check_layers(text: str) -> str:
    if not re.fullmatch(r"all|[0-9]+(-[0-9]+)?|(first|last):[1-9][0-9]*", text):
        raise ValueError(f"expected layers such as 7, 0-3, first:4, last:4 or all, found {text!r}")
    return text


Layers = Annotated[str, AfterValidator(_check_layers)]
NumberedLayers = Annotated[Layers, BeforeValidator(lambda layers: str(layers) if isinstance(layers, int) else layers)]
"""Layers of the model: `all`, `7`, `0-3`, `first:4`, `last:4`."""
OneOrMore = Annotated[
    list[Text], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
Blocks = Text | Annotated[list[Text], Field(min_length=1)]
"""A block, `kv2+w512`, or one half of it, `kv2`, `*+none`; `parent` for the parent's own; a list for any of them."""


class Section(
    BaseModel,
    frozen=True,
    extra="forbid",
    arbitrary_types_allowed=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
):
    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """Accept a section whose lines are all commented out; and no `true` as a 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            given = any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value]))
            if given and name in cls.model_fields and "bool" not in str(cls.model_fields[name].annotation):
                raise ValueError(f"{name}: found {value}; it is no yes or no")
        return {} if values is None else values


SectionT = TypeVar("SectionT", bound=Section)


class DataSettings(Section):
    """Text for calibration, training, scoring and evaluation."""

    source: OneOrMore
    """Files or folders (.txt, .py, .md, .jsonl, .parquet), a Hugging Face dataset, `name:config:split`, or `parent` for
    text that the parent writes."""
    sampled_tokens: PositiveCount = 10_000_000
    """Tokens that the parent writes where `source` names it."""
    column: Text = "text"
    """Column of jsonl, parquet and datasets: text, or lists of messages, which go through the chat template."""
    special_tokens: bool = False
    """Whether special tokens written in plain text, such as `<|im_end|>`, are these tokens; else they are text."""
    sequence_length: Annotated[Count, Field(ge=2)] = 2048
    """Tokens per sequence."""
    max_tokens: PositiveCount | None = None
    """Stop tokenising after this many tokens; null: read all text."""
    calibration: Share = 0.05
    """Share of the documents for calibration. Training takes what the four shares leave."""
    validation: Share = 0.03
    """Share of the documents for validation during training."""
    scoring: Share = 0.03
    """Share of the documents for scoring blocks."""
    test: Share = 0.04
    """Share of the documents for the final evaluation, unseen until then."""

    @model_validator(mode="after")
    def _leave_text_for_training(self) -> Self:
        total = self.calibration + self.validation + self.scoring + self.test
        if total >= 1:
            found = f"calibration, validation, scoring and test add up to {total:.4g}"
            raise ValueError(f"{found}, which leaves no text for training; keep their sum below 1")
        return self


class SpaceSettings(Section):
    """Variants to build."""

    kv_heads: list[PositiveInt] | None = None
    """Numbers of KV heads; null: the parent's halved, down to 1."""
    ffn_widths: list[PositiveInt] | None = None
    """FFN intermediate sizes; null: 87, 75, 50, 25, 20 and 10 % of the parent's, rounded."""
    attention: list[Text] = ["linear", "none"]
    """Other attention variants by name: `linear`, `none`, `kv2q8` (8 query heads), `kv2win1024s4` (window, 4 sinks)."""
    ffn: list[Text] = ["linear", "none"]
    """Other FFN variants by name: `linear`, `none`, `rank64`."""
    types: list[GGMLType] = []
    """Types of a GGUF file, such as `q8_0`, `q5_0`, `q4_0`: every variant also with its matrices rounded to each."""
    outer: GGMLType | None = None
    """Type of embeddings and head; null: the scenario's dtype."""
    importance: bool = True
    """Weigh errors of rounding by inputs' mean squares in the calibration text (llama.cpp's importance matrix)."""


class CalibrationSettings(Section):
    """Statistics of the parent's activations, from which variants are initialised."""

    tokens: PositiveCount = 500_000
    """Calibration tokens."""


class LibrarySettings(Section):
    """Initialisation of every variant and blockwise local distillation (BLD)."""

    start: Literal["closed_form", "paper"] = "closed_form"
    """Initialisation: `closed_form` (least squares on calibration statistics) or `paper` (from weights alone)."""
    channels: Literal["iterative", "independent"] = "iterative"
    """Ranking of FFN channels: `iterative` (given those already removed) or `independent`."""
    loss: Literal["subblock", "block"] = "subblock"
    """What is compared with the parent's: the output of the subblock, or that of the whole block."""
    least_squares: bool = True
    """After training, update the output projection of every variant by least squares; kept where that helps."""
    coupled: PositiveInt | None = None
    """Train this many attention and FFN variants per layer, those the frontier uses most, again as whole blocks."""
    tokens: Count = 1_000_000
    """Training tokens, the same for all variants; 0: no training."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    batch_size: PositiveInt = 8
    """Sequences per step."""
    validation_tokens: PositiveCount = 32_768
    """Validation tokens on which the best weights are chosen; refinement uses them too."""


class ScoreSettings(Section):
    """Replace-1-block scores."""

    tokens: PositiveCount = 65_536
    """Scoring tokens per block."""
    composed_share: Share | None = 0.0625
    """Share of the tokens for blocks with both subblocks replaced, whose scores are estimated from it and from those of
    blocks with one of them replaced on all tokens; null: all tokens."""
    task: Text | None = None
    """Also score blocks by a function of your own, `module:function`, from a model to a number; higher is better."""


class ScenarioSettings(Section):
    """How the child will be served."""

    engine: Literal["torch", "vllm", "llama.cpp", "roofline"] = "torch"
    """Inference engine; `roofline` calculates times from a machine's data sheet instead of measuring."""
    machine: Text = "h100-sxm"
    """Machine for `roofline`: a known one, a data sheet (YAML), or `8xh100-sxm` for tensor parallelism over 8."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and KV cache; `auto`: `precision`, but roofline's is bfloat16 and llama.cpp's float16."""
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1]
    """Batch sizes that the search may choose from."""
    prompt_tokens: PositiveCount = 1024
    """Prompt tokens per request."""
    generated_tokens: PositiveCount = 256
    """Generated tokens per request."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one machine among which vLLM shares the matrices."""
    gpu_memory: Share = 0.9
    """Share of a GPU's free memory that vLLM may take."""

    @model_validator(mode="after")
    def _is_of_vllm(self) -> Self:
        for name in ("tensor_parallel", "gpu_memory"):
            if self.engine != "vllm" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: engine {self.engine} has none; take vllm, or roofline's 8xh100-sxm")
        return self

    def resolved(self, precision: str) -> Self:
        """With the data type that `auto` stands for where the recipe's precision is this."""
        served = {"roofline": "bfloat16", "llama.cpp": "float16"}.get(self.engine, precision)
        return self.model_copy(update={"dtype": served}) if self.dtype == "auto" else self


class CostSettings(Section):
    """Measurement of costs."""

    repeats: PositiveInt = 3
    """Rounds of measurement; each measures every variant once. Up to four times as many where times scatter."""
    reuse: bool = True
    """Take measurements kept from earlier runs on this machine, unless they are clearly off by now."""


def _bound(quantity: Quantity) -> Any:
    help_text = f"{quantity.direction.capitalize()}: {quantity.meaning}."
    return amount(quantity.unit, relative=bool(quantity.columns)) | None, Field(None, description=help_text)


_Bounds: Any = create_model("_Bounds", __base__=Section, **{name: _bound(each) for name, each in SETTINGS.items()})


class TargetSettings(_Bounds, Section):
    """Bounds on the child: absolute (`24GB`, `200ms`) or relative to the parent (`2x`, `80%`)."""


class FurtherScenarioSettings(Section):
    """A scenario beside the main one, and what the same child must reach in it, at a batch size of its own."""

    scenario: ScenarioSettings
    target: TargetSettings


class SearchSettings(Section):
    """The mixed-integer program."""

    score: Literal["kl", "lm_loss", "cosine", "task"] = "kl"
    """Which of the blocks' scores to add up."""
    objective: Annotated[str, AfterValidator(check_setting)] = "score"
    """What is best within the bounds: the lowest `score`, or another quantity where the target bounds the score."""
    fix: dict[NumberedLayers, Blocks] = {}
    """What layers must take, as `{first:4: parent, 7: kv2+w512, last:2: kv4}`: blocks, subblocks, lists of them."""
    forbid: dict[NumberedLayers, Blocks] = {}
    """What layers must not take, in the same terms, as `{all: [linear+*, none+none]}`."""
    equal: PositiveInt | Layers | Annotated[list[NumberedLayers], Field(min_length=1)] | None = None
    """Layers that take one block together: `all`, groups of `4` consecutive ones, or a list such as `[0-7, 8-15]`."""
    gap: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    """Relative gap at which a solution counts as optimal."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share by which predicted speeds and times must be better than asked, so that measured ones meet the target."""
    time_limit_s: PositiveFloat = 60.0
    """Seconds after which the best solution so far is taken, for each batch size."""


class CorrectSettings(Section):
    """Whole architectures compared, after the search and before the child: blocks add up, but not quite."""

    tokens: Count = 16_384
    """Scoring text, from its end, on which whole architectures are compared; 0: what the search found is taken."""
    pool: Count = 16
    """Solutions of the search that are compared, the best ones of the summed score; 0: none beside the best."""
    differing: PositiveInt = 2
    """Layers in which each of these differs from all before."""


class RefineSettings(Section):
    """Sequential refinement: before GKD, train the child's blocks layer by layer on the child's own hidden states."""

    tokens: Count = 0
    """Training tokens per layer; 0: no refinement."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    batch_size: PositiveInt = 8
    """Sequences per step."""


class DistilSettings(Section):
    """Global knowledge distillation (GKD) of the child."""

    tokens: Count = 10_000_000
    """Training tokens; 0: no training."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    batch_size: PositiveInt = 8
    """Sequences per step."""
    accumulate: PositiveInt = 1
    """Parts in which a step's sequences are run, one after another: less memory, the same step."""
    warmup: Annotated[Fraction, Field(ge=0, lt=1)] = 0.05
    """Share of the steps with rising learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay, applied to weights with two or more dimensions."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm at which gradients are clipped."""
    cosine_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cosine distance between hidden states, averaged over layers."""
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KL divergence between next-token distributions, KL(parent || child)."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the language-modelling loss: negative log-likelihood of the text itself."""
    documents: bool = True
    """Tokens of a packed sequence attend only to their own document."""
    teacher_cache: PositiveInt | None = None
    """Number of the parent's likeliest tokens kept on disk as the teacher, without parent in memory or cosine loss."""
    validation_tokens: PositiveCount = 32_768
    """Held-out text of each point of the curve; the child that was best on it is the result."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.cosine_weight == self.kl_weight == self.lm_weight == 0:
            raise ValueError("cosine_weight, kl_weight and lm_weight are all 0, so nothing would be learned; raise one")
        if self.batch_size % self.accumulate:
            found = f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            raise ValueError(f"{found}; give a divisor of it")
        if self.teacher_cache and self.kl_weight == 0:
            raise ValueError("teacher_cache serves the KL divergence alone; raise kl_weight, or set it to null")
        return self


class EvaluateSettings(Section):
    """Final evaluation."""

    tokens: PositiveCount = 131_072
    """Test tokens."""
    uniform_baseline: bool = True
    """Also build, distil and evaluate a uniform child of the same speed, for comparison: all layers alike."""
    tasks: list[Text] = []
    """Tasks of lm-eval for parent, child and uniform child: names, yaml files of your own or folders of them."""


class ExecutionSettings(Section):
    """Where and how to execute. Of the results, only measured costs depend on it."""

    device: Text = "auto"
    """Device: `cpu`, `cuda`, `cuda:1`, or `auto` (a GPU if there is one)."""
    threads: PositiveInt | None = None
    """CPU threads; null: torch decides."""
    memory: Size | None = None
    """Device memory for weights and training states; null: 80 % of a GPU's free memory, half of a computer's."""
    disk: Size | None = None
    """Disk for activations of a parent that does not fit into memory; null: half of what is free."""
    checkpointing: bool = False
    """Recompute activations inside layers in GKD's backward pass: less memory, a third more time."""


class Recipe(Section):
    """A complete recipe. Paths in it are relative to where the command is run."""

    parent: Text
    """Folder of a Hugging Face checkpoint, a hub name, or a GGUF file, which is read back by transformers."""
    data: DataSettings
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type in which models run in calibration, BLD, scoring, GKD and evaluation; `auto`: bfloat16 on a GPU or a
    processor that multiplies it faster, else float32."""
    space: SpaceSettings = SpaceSettings()
    deploy: list[Literal["hf", "vllm", "deci", "gguf"]] = []
    """Engines and formats that must run the child, such as `vllm` or `gguf` (docs/engines.md). They restrict the space,
    as engines that are timed do."""
    calibration: CalibrationSettings = CalibrationSettings()
    library: LibrarySettings = LibrarySettings()
    score: ScoreSettings = ScoreSettings()
    scenario: ScenarioSettings = ScenarioSettings()
    cost: CostSettings = CostSettings()
    target: TargetSettings = TargetSettings()
    scenarios: list[FurtherScenarioSettings] = []
    """Further scenarios for the same child, each a section with a `scenario` and a `target`."""
    search: SearchSettings = SearchSettings()
    correct: CorrectSettings = CorrectSettings()
    refine: RefineSettings = RefineSettings()
    distil: DistilSettings = DistilSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed."""
    execution: ExecutionSettings = ExecutionSettings()

    @property
    def corrected(self) -> bool:
        """Whether whole architectures are compared: for the lowest sum of scores, not a user's, within bounds."""
        bounded = any(value is not None for *_, target in self.served for name, value in target if name != "score")
        wanted = self.correct.tokens > 0 and bounded
        return wanted and self.search.objective == "score" and self.search.score != "task"

    @property
    def served(self) -> list[tuple[str, ScenarioSettings, TargetSettings]]:
        """Every scenario, the main one first: the path before its settings, these, and its target."""
        further = ((f"scenarios[{place}].", each.scenario, each.target) for place, each in enumerate(self.scenarios))
        return [("", self.scenario, self.target), *further]

    def resolved(self, auto: str) -> Self:
        """With data types in place of each `auto`; that of the precision is `auto`."""
        precision = auto if self.precision == "auto" else self.precision
        update: dict[str, Any] = {"precision": precision, "scenario": self.scenario.resolved(precision)}
        if self.scenarios:
            scenarios = [(each, each.scenario.resolved(precision)) for each in self.scenarios]
            update["scenarios"] = [each.model_copy(update={"scenario": scenario}) for each, scenario in scenarios]
        return self.model_copy(update=update)

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None, text: str | None = None) -> "Recipe":
        """The recipe in a YAML file, with `overrides` (`{"target.throughput": "2x"}`) put in before it is validated.

        Args:
            text: what is in the file, if that is known: a pipe can be read once.

        Raises:
            PuzzleError: the file is missing, is no YAML, or a setting in it is wrong; in one line.
        """
        text = recipe_text(path) if text is None else text
        try:
            values = parse_yaml(text)
        except ValueError as error:
            raise PuzzleError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            found = "is empty" if values is None else f"holds {type(values).__name__}, not settings"
            raise PuzzleError(f"{path} {found}; `puzzle init MODEL` shows what a recipe looks like")
        for key, value in (overrides or {}).items():
            *sections, name = key.split(".")
            place = values
            for section in sections:
                if place.get(section) is None:
                    place[section] = {}
                place = place[section]
                if not isinstance(place, dict):
                    raise PuzzleError(f"--set {key}: {section} is a setting itself, it has none under it")
            place[name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise PuzzleError(f"{path}: {explain(error, cls)}") from None

    def to_yaml(self) -> str:
        """What was given, defaults left out."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def validate(section: type[SectionT], values: dict[str, Any], name: str) -> SectionT:
    """Validate one section of a recipe alone; an error is one line, as for a whole recipe."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise PuzzleError(f"{name}.{explain(error, section)}") from None


def parse_overrides(
    assignments: list[str], flag: str = "--set", example: str = "target.throughput=2x"
) -> dict[str, Any]:
    """`["target.throughput=2x"]` to `{"target.throughput": "2x"}`; values are YAML."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise PuzzleError(f"{flag} {assignment}: expected key=value, such as {example}")
        try:
            overrides[key] = parse_yaml(text)
        except ValueError as error:
            raise PuzzleError(f"{flag} {assignment}: {text!r} is not a YAML value: {error}") from None
    return overrides


def recipe_text(path: Path) -> str:
    """What is in a recipe's file, or comes out of a pipe; a `PuzzleError` if nothing can."""
    if path.is_dir():
        raise PuzzleError(f"{path} is a folder, not a recipe; name a file, such as {path / 'recipe.yaml'}")
    try:
        return read_given(path)
    except FileNotFoundError:
        raise PuzzleError(f"recipe {path} does not exist; `puzzle init MODEL --out {path}` writes one") from None
    except ValueError as error:
        raise PuzzleError(f"{path} is not valid YAML: {error}") from None
