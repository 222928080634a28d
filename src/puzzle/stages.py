"""Every stage of the method, declared once and in order.

Addresses in the run folder (`runs/`), commands, `puzzle status`, `puzzle plan` and the times in the report follow from
this list. A new stage is an entry here, a function that opens it, and a property of `pipeline.Pipeline`.

What a stage takes is calculated from shapes: a forward pass takes two operations a parameter and token, a backward pass
four (docs/scaling.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from puzzle.plan import Shapes
    from puzzle.recipe import Recipe

BLD_BYTES = 28
"""Memory of a parameter in BLD: float32 weight, gradient, two AdamW moments, and the weights at start, best and now."""
_GKD_BYTES = 20
"""The same in GKD: float32 weight, gradient, two moments, and the best weights so far."""
_KEPT_BYTES, _STATE_BYTES = 4, 12
"""Disk of a parameter: float32 weight; and in a saved training state, weight and two moments."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage takes, by calculation."""

    operations: tuple[float, ...] = ()
    """One entry for each task; tasks are independent, and run on as many devices as there are."""
    kind: Literal["forward", "training", "float32"] = "forward"
    """At which rate they run: that of a forward pass, of training, or of float32 products."""
    shared: bool = False
    """Whether all devices work on the one task together, as in GKD."""
    forward: float = 0.0
    """Operations that each device does besides: forward passes of the parent."""
    seconds: float = 0.0
    """Time that follows from no operations, of measurements."""
    held_bytes: float = 0.0
    """Memory on every device, beside a parent whose layers are read as they are needed."""
    sharded_bytes: float = 0.0
    """Memory that all devices share out."""
    disk_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the method, whose result lies in a folder of its own."""

    name: str
    """Of its folder, its command and its time."""
    help: str
    """One line."""
    result: str = ""
    """The property of `Pipeline` that gives its result; empty for a part of another stage, which has no command."""
    reads: tuple[str, ...] = ()
    """Sections and settings of the recipe that change its result; never `execution`, which changes none."""
    inputs: tuple[str, ...] = ()
    """What else changes its result, by name: artefacts with an `address`, or plain values."""
    measures: bool = False
    """Whether it times something here: its result is kept wherever it is read, unless `--remeasure` asks."""
    version: int = 1
    """Raised when its code would now give another result for the same settings and inputs."""
    work: "Callable[[Shapes], Work]" = lambda shapes: Work()
    """What it takes; nothing where that is too little to plan."""
    wanted: "Callable[[Recipe], bool]" = lambda recipe: True
    """Whether this recipe asks for it."""


def _calibration_work(shapes: "Shapes") -> Work:
    """A value of a moment is the sum of float32 products over all tokens."""
    tokens = shapes.recipe.calibration.tokens
    return Work(
        operations=tuple(2.0 * tokens * values for values in shapes.moments),
        kind="float32",
        forward=tokens * shapes.forward,
        held_bytes=4 * max(shapes.moments),
        disk_bytes=4 * sum(shapes.moments),
    )


def _library_work(shapes: "Shapes") -> Work:
    tokens = shapes.recipe.library.tokens
    return Work(
        operations=tuple(tokens * 6.0 * trained for trained in shapes.trained_params),
        kind="training",
        forward=tokens * shapes.forward,
        held_bytes=BLD_BYTES * max(shapes.trained_params),
        disk_bytes=_KEPT_BYTES * shapes.library_params + _STATE_BYTES * max(shapes.trained_params),
    )


def _score_work(shapes: "Shapes") -> Work:
    """Of each layer, what comes after it, for every block's share of the text."""
    settings = shapes.recipe.score
    tokens = [
        settings.tokens * (1 + single + composed * (settings.composed_share or 1.0))
        for single, composed in shapes.scored
    ]
    return Work(
        operations=tuple(count * after for count, after in zip(tokens, shapes.suffixes[1:], strict=True)),
        forward=settings.tokens * shapes.forward,
    )


def _cost_work(shapes: "Shapes") -> Work:
    scenarios = [scenario for _, scenario, _ in shapes.recipe.served if scenario.engine != "roofline"]
    batch_sizes = sum(len(scenario.batch_sizes) for scenario in scenarios)
    return Work(seconds=0.5 * shapes.num_stacks * batch_sizes * shapes.recipe.cost.repeats)


def _refine_work(shapes: "Shapes") -> Work:
    return Work(
        operations=(shapes.recipe.refine.tokens * 4.0 * shapes.forward * shapes.children,),
        kind="training",
        held_bytes=BLD_BYTES * max(shapes.layer_params),
        disk_bytes=_KEPT_BYTES * shapes.num_params * shapes.children,
    )


def _distil_work(shapes: "Shapes") -> Work:
    """The parent's forward pass, the child's forward and backward pass; weights are sharded (FSDP2)."""
    settings, params = shapes.recipe.distil, shapes.num_params
    sequences = settings.batch_size // settings.accumulate
    checkpointing = shapes.recipe.execution.checkpointing
    again = 1.0 if checkpointing else 0.0
    kept_layers = 1 if checkpointing else len(shapes.layer_params)
    cached = 8 * settings.tokens * (settings.teacher_cache or 0)  # a token and its log-probability
    return Work(
        operations=(settings.tokens * (4.0 + again) * shapes.forward * shapes.children,),
        kind="training",
        shared=True,
        held_bytes=shapes.streamed_bytes,
        sharded_bytes=(_GKD_BYTES + shapes.itemsize) * params + sequences * kept_layers * shapes.layer_activations,
        disk_bytes=(3 * _KEPT_BYTES * shapes.children + _STATE_BYTES) * params + cached,
    )


SAMPLE = Stage(
    name="sample",
    help="Let the parent write text, if data.source names it.",
    result="sampled",
    reads=("data.sampled_tokens", "data.column", "data.sequence_length", "precision", "seed"),
    inputs=("parent",),
    work=lambda of: Work(operations=(of.recipe.data.sampled_tokens * of.forward,)),
    wanted=lambda recipe: "parent" in recipe.data.source,
)
DATA = Stage(
    name="data",
    help="Tokenise the text, split it and pack it.",
    result="data",
    reads=(
        *("data.column", "data.special_tokens", "data.sequence_length", "data.max_tokens"),
        *("data.calibration", "data.validation", "data.scoring", "data.test"),
    ),
    inputs=("tokenizer", "sources"),
    version=3,
)
CALIBRATE = Stage(
    name="calibrate",
    help="Collect statistics of the parent's activations.",
    result="statistics",
    reads=("calibration", "precision"),
    inputs=("parent", "data"),
    version=2,
    work=_calibration_work,
)
LIBRARY = Stage(
    name="library",
    help="Build and train every variant of every layer (BLD).",
    result="library",
    reads=(
        *("library.start", "library.channels", "library.loss", "library.least_squares"),
        *("library.tokens", "library.learning_rate", "library.batch_size", "library.validation_tokens"),
        *("calibration.tokens", "precision", "seed"),
    ),
    inputs=("parent", "data", "statistics", "space", "coupled"),
    work=_library_work,
)
SCORE = Stage(
    name="score",
    help="Score every block alone in the parent (replace-1-block).",
    result="scores",
    reads=("score.tokens", "score.composed_share", "precision"),
    inputs=("library", "data", "space", "task"),
    work=_score_work,
)
COST = Stage(
    name="cost",
    help="Measure what every variant costs on the engine.",
    result="costs",
    reads=("cost",),
    inputs=("shapes", "space", "scenario"),
    measures=True,
    version=3,
    work=_cost_work,
)
SEARCH = Stage(
    name="search",
    help="Choose the best architecture within the target (MIP).",
    result="searched",
    reads=("target", "scenarios", "search"),
    inputs=("scores", "costs", "margin"),
)
TIMING = Stage(
    name="timing",
    help="Time the solution and the parent on the engine.",
    version=2,
    inputs=("parent", "scenario", "environment", "target", "models"),
    measures=True,
)
CORRECT = Stage(
    name="correct",
    help="Compare the best solutions of the search as whole architectures.",
    result="solution",
    reads=("correct", "target", "scenarios", "search", "precision"),
    inputs=("library", "data", "scores", "costs", "margin"),
    work=lambda of: Work(operations=(of.recipe.correct.tokens * (1 + of.recipe.correct.pool) * of.forward,)),
    wanted=lambda recipe: recipe.correct.tokens > 0,
)
REALISE = Stage(
    name="realise",
    help="Put the chosen child together.",
    result="child_before",
    inputs=("parent", "library", "blocks"),
)
REFINE = Stage(
    name="refine",
    help="Train the child's blocks one after another on its own inputs, if the recipe says so.",
    result="child_refined",
    reads=("refine", "library.validation_tokens", "precision", "seed"),
    inputs=("parent", "child", "data"),
    work=_refine_work,
    wanted=lambda recipe: recipe.refine.tokens > 0,
)
TEACHER = Stage(
    name="teacher",
    help="Keep the parent's likeliest tokens for GKD.",
    reads=("distil", "precision", "seed"),
    inputs=("parent", "data"),
)
DISTIL = Stage(
    name="distil",
    help="Train the child as a whole (GKD).",
    result="child_distilled",
    reads=("distil", "precision", "seed"),
    inputs=("parent", "child", "data"),
    work=_distil_work,
    wanted=lambda recipe: recipe.distil.tokens > 0,
)
ROUND = Stage(
    name="round",
    help="Round the child's matrices to their types.",
    result="child",
    reads=("space.importance",),
    inputs=("child", "statistics"),
    wanted=lambda recipe: bool(recipe.space.types or recipe.space.outer),
)
EVALUATE = Stage(
    name="evaluate",
    help="Compare child and parent, in quality and speed.",
    result="rows",
    reads=("evaluate.tokens", "precision"),
    inputs=("parent", "model", "data"),
    work=lambda of: Work(operations=(2 * of.forward * of.recipe.evaluate.tokens * (of.children + 2),)),
)
TASKS = Stage(
    name="tasks",
    help="Run tasks of lm-eval on parent and children.",
    result="tasks",
    reads=("precision",),
    inputs=("model", "task"),
    wanted=lambda recipe: bool(recipe.evaluate.tasks),
)
UNIFORM = Stage(
    name="uniform",
    help="Find the uniform child that is as fast as the child.",
    version=2,
    reads=("search",),
    inputs=("parent", "space", "scores", "costs", "influence", "child"),
)
SPEED = Stage(
    name="speed",
    help="Time whole models on the engine.",
    reads=("cost.repeats",),
    inputs=("scenario", "environment", "models"),
    measures=True,
)
EXPORT = Stage(
    name="export",
    help="Write the child as a checkpoint for other programs.",
    result="exported",
    inputs=("child", "card", "dtype"),
)
REPORT = Stage(name="report", help="Write the report.", result="report")

STAGES = (
    *(SAMPLE, DATA, CALIBRATE, LIBRARY, SCORE, COST, SEARCH, TIMING, CORRECT, REALISE, REFINE, TEACHER, DISTIL, ROUND),
    *(EVALUATE, TASKS, UNIFORM, SPEED, EXPORT, REPORT),
)
"""In the order of the method."""
COMMANDS = tuple(stage for stage in STAGES if stage.result)
