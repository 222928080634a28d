"""What a recipe takes on many devices, by calculation from data sheets: memory, bytes moved, speed, time.

Every stage but GKD is a bag of tasks, each a range of layers or one layer; GKD is one job with its weights, gradients
and moments sharded over all devices (FSDP2). docs/scaling.md derives the formulas.

Symbols: n devices, D hidden size, I FFN channels, T tokens of a sequence, b sequences of a device at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puzzle.costs import Machine, read_machine
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.plan.here import describe
from puzzle.plan.work import Work
from puzzle.recipe import Recipe
from puzzle.units import format_bytes, format_seconds
from puzzle.variants import GatedFFN, GroupedQuery, Space

_BLD_BYTES = 28
"""Of a trained parameter in memory: float32 weight, gradient, two moments, and copies of start, best and now."""
_GKD_BYTES = 16
"""Of a child's parameter, over all devices: float32 weight, gradient, two moments."""
_TRAINING_SHARE = 0.4
"""Of the peak rate that training reaches; a forward pass reaches the data sheet's `compute_share`."""

_HINTS = {
    "calibrate": "shorter sequences (data.sequence_length)",
    "library": "fewer variants of a layer (space), shorter sequences",
    "score": "shorter sequences (data.sequence_length)",
    "correct": "finalists are trained on one device: correct.finalists=0, or shorter sequences (data.sequence_length)",
    "refine": "shorter sequences (data.sequence_length)",
    "distil": "more devices, distil.accumulate, distil.checkpointing, shorter sequences",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage on the devices that it can use."""

    stage: str
    devices: int
    tokens: int
    seconds: float
    memory_bytes: float
    """The most on one device, activations included."""
    moved_bytes: float = 0.0
    """Over the links of one device, in the whole stage."""
    bound: str = "compute"
    """What takes the time: `compute` or `links`."""


def plan_devices(recipe: Recipe, config: PuzzleConfig, space: Space, devices: str) -> list[str]:
    """Lines for a person: a table of the stages on `devices`, such as `8xh100-sxm`."""
    machine, count = read_machine(devices, "--devices")
    planner = _Planner(Work(recipe, config, space), machine, count)
    stages = planner.stages()
    short = [stage for stage in stages if stage.memory_bytes > 1e9 * machine.memory_gb]
    warnings = [
        f"{stage.stage} needs {format_bytes(stage.memory_bytes)} of a device's {machine.memory_gb:g} GB: "
        f"{_HINTS[stage.stage]}"
        for stage in short
    ]
    total = format_seconds(sum(stage.seconds for stage in stages))
    return [
        *describe(planner.work),
        *_table(stages),
        f"disk: about {format_bytes(planner.work.disk_bytes(planner.layers_in_flight()))}; "
        f"time by calculation: {total}, with the most that correct can take, without tokenising, costs and export",
        *warnings,
    ]


@dataclass(frozen=True)
class _Planner:
    work: Work
    machine: Machine
    count: int

    def stages(self) -> list[StagePlan]:
        recipe, layers = self.work.recipe, range(len(self.work.space.layers))
        return [
            self._ranges("calibrate", [self.work.moments(layer) for layer in layers], recipe.calibration.tokens),
            self._ranges("library", [6.0 * students for students in self.work.students], recipe.library.tokens),
            self._scores(),
            *([self._correct()] if recipe.corrected else []),
            *([self._refine()] if recipe.refine.tokens else []),
            self._gkd(),
        ]

    def layers_in_flight(self) -> range:
        """Layers whose students fit onto one device together, from the first."""
        room = 1e9 * self.machine.memory_gb / 2 - self._streamed_bytes()
        count = 1
        while count < len(self.work.students) and _BLD_BYTES * sum(self.work.students[: count + 1]) <= room:
            count += 1
        return range(count)

    def _ranges(self, stage: str, own: Sequence[float], tokens: int) -> StagePlan:
        """Ranges of layers, one a device; each runs the parent up to its end, so the last one takes longest.

        Args:
            own: operations a token of each layer beside the parent's.
        """
        num_layers = len(own)
        devices = min(self.count, num_layers)
        length = -(-num_layers // devices)
        last = own[num_layers - length :]
        # Moments are float32 products.
        rate = self._rate("float32") if stage == "calibrate" else self._rate(share=_TRAINING_SHARE)
        seconds = tokens * (self.work.forward / self._rate() + sum(last) / rate)
        if stage == "calibrate":
            held = max(self.work.moment_bytes(layer) for layer in range(num_layers))
        else:
            held = _BLD_BYTES * max(self.work.students)
        return StagePlan(stage, devices, tokens, seconds, held + self._streamed_bytes() + self._one_layer(1))

    def _scores(self) -> StagePlan:
        """A task a layer, the longest first, each to the device that is free first."""
        busy = [0.0] * min(self.count, len(self.work.space.layers))
        for operations in sorted(map(self.work.scoring, range(len(self.work.space.layers))), reverse=True):
            busy[busy.index(min(busy))] += operations
        tokens = self.work.recipe.score.tokens
        seconds = (max(busy) + self.work.forward * tokens) / self._rate()
        return StagePlan("score", len(busy), tokens, seconds, self._streamed_bytes() + self._one_layer(1))

    def _correct(self) -> StagePlan:
        """Whole architectures and finalists, on one device; at most (`Work.comparing`)."""
        work, settings = self.work, self.work.recipe
        training = 4.0 * work.forward * work.finalist_tokens
        seconds = work.comparing / self._rate() + training / self._rate(share=_TRAINING_SHARE)
        # What enters and leaves a layer takes half of `execution.memory`, which is half of a device's.
        states = (settings.execution.memory or 1e9 * self.machine.memory_gb / 2) / 2
        blocks = self._size * max(self.work.students)
        held = states + blocks + self._streamed_bytes() + self._one_layer(1)
        memory = max(held, self._gkd_bytes(1) if work.finalists else 0.0)
        return StagePlan("correct", 1, settings.correct.tokens, seconds, memory)

    def _refine(self) -> StagePlan:
        """One layer after the other, on one device."""
        seconds = self.work.operations["refine"] / self._rate(share=_TRAINING_SHARE)
        held = _BLD_BYTES * max(self.work.layer_params) + self._streamed_bytes() + self._one_layer(1)
        return StagePlan("refine", 1, self.work.recipe.refine.tokens * self.work.children, seconds, held)

    def _gkd(self) -> StagePlan:
        """All devices in lock step: the parent's forward pass, the child's forward and backward pass."""
        tokens = self.work.recipe.distil.tokens
        settings, n = self.work.recipe.distil, self.count
        if settings.batch_size % n:
            raise PuzzleError(
                f"distil.batch_size: {settings.batch_size} sequences a step cannot be shared by {n} devices; "
                f"take a multiple of {n}"
            )
        passes = tokens / (n * self._at_a_time(n) * self.work.recipe.data.sequence_length)
        size, params = self._size, self.work.num_params
        # Of the parent once, of the child once forward and once backward; gradients are summed in float32.
        moved = passes * self.work.children * params * (3 * size + 4) * (n - 1) / n
        again = 1.0 if settings.checkpointing else 0.0
        operations = (4.0 + again) * self.work.forward * tokens * self.work.children / n
        compute = operations / self._rate(share=_TRAINING_SHARE)
        links = moved / self._link_bytes_s
        bound = "links" if links > compute else "compute"
        return StagePlan(
            "distil", n, tokens * self.work.children, max(compute, links), self._gkd_bytes(n), moved, bound
        )

    def _at_a_time(self, devices: int) -> int:
        """Sequences that a device trains on at a time in GKD."""
        settings = self.work.recipe.distil
        return max(1, settings.batch_size // devices // settings.accumulate)

    def _gkd_bytes(self, devices: int) -> float:
        """Of GKD on one of so many devices."""
        size, params = self._size, self.work.num_params
        weights = (size * params + _GKD_BYTES * params) / devices
        # Two layers of both models at a time: one at work, one on its way; and both heads with their embeddings.
        gathered = 2 * size * (2 * max(self.work.layer_params) + self.work.outer_params)
        return weights + gathered + self._activations(self._at_a_time(devices))

    @property
    def _size(self) -> int:
        return 2 if self.work.recipe.precision == "bfloat16" else 4

    def _rate(self, dtype: str | None = None, share: float | None = None) -> float:
        """Operations a second of one device."""
        dtype = dtype or self.work.recipe.precision
        if dtype not in self.machine.peak_tflops:
            raise PuzzleError(f"--devices: the data sheet has no rate for {dtype}; add it or change `precision`")
        return 1e12 * self.machine.peak_tflops[dtype] * (share or self.machine.compute_share)

    @property
    def _link_bytes_s(self) -> float:
        """Within one node its own links, between nodes the network, which then is the slowest part of the ring."""
        within = self.count <= self.machine.node_devices
        return 1e9 * (self.machine.link_gb_s if within else self.machine.network_gb_s)

    def _streamed_bytes(self) -> float:
        """Of a parent whose layers are read as they are needed: two of them, embeddings and head."""
        return self._size * (2 * max(self.work.layer_params) + self.work.outer_params)

    def _one_layer(self, sequences: int) -> float:
        """Activations that one layer keeps for its backward pass.

        Of each token in and between the subblocks and their norms 4 D, queries and outputs, keys and values, and 3 I.
        """
        config, widest = self.work.config, 0
        assert config.head_dim is not None
        for layer in self.work.space.layers:
            own = layer.parent
            channels = own.ffn.intermediate_size if isinstance(own.ffn, GatedFFN) else 0
            heads = own.attention.num_kv_heads if isinstance(own.attention, GroupedQuery) else 0
            projected = 2 * config.head_dim * (config.num_attention_heads + heads)
            widest = max(widest, 4 * config.hidden_size + projected + 3 * channels)
        return float(sequences * self.work.recipe.data.sequence_length * self._size * widest)

    def _activations(self, sequences: int) -> float:
        """Of the child; with checkpointing what enters each layer, and one layer whole."""
        num_layers, settings = len(self.work.space.layers), self.work.recipe.distil
        if not settings.checkpointing:
            return num_layers * self._one_layer(sequences)
        entering = sequences * self.work.recipe.data.sequence_length * self._size * self.work.config.hidden_size
        return num_layers * entering + self._one_layer(sequences)


def _table(stages: Iterable[StagePlan]) -> list[str]:
    rows = [("stage", "devices", "memory each", "moved each", "tokens/s", "bound by", "time")]
    for stage in stages:
        rows.append(
            (
                stage.stage,
                str(stage.devices),
                format_bytes(stage.memory_bytes),
                format_bytes(stage.moved_bytes) if stage.moved_bytes else "-",
                f"{stage.tokens / stage.seconds:,.0f}",
                stage.bound,
                format_seconds(stage.seconds),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
