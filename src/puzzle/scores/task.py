"""A score of the user's own: a function from a model to a number, the higher the better."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

from puzzle.errors import PuzzleError, one_line
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish
from puzzle.runs import Run, read_json, write_json
from puzzle.streams import Stream
from puzzle.units import format_bytes
from puzzle.variants import Architecture, BlockVariant, State

Task = Callable[[PuzzleForCausalLM], float]


def load_task(text: str) -> Task:
    """The function that the recipe's `score.task` names, `module:function`; modules are also looked for where the
    command is run.
    """
    module_name, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), name)
    except AttributeError:
        raise PuzzleError(f"score.task: module {module_name} has no function {name!r}") from None
    except Exception as error:  # whatever the module raises when it is imported, the reader needs one line
        raise PuzzleError(
            f"score.task: found {text!r}, which cannot be imported ({type(error).__name__}: {one_line(error)}); "
            "write module:function, of a module that Python finds from here"
        ) from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise PuzzleError(f"score.task: {text} is no function")
    return found


def task_name(task: Task) -> str:
    """What stands for a task in an address; a change of its code does not change that."""
    try:
        return f"{task.__module__}:{task.__qualname__}"
    except AttributeError:
        raise PuzzleError("score.task: found a callable without a name; give a function") from None


class TaskScores:
    """The task's numbers of the parent and of its blocks, kept in a file over restarts; None without a task."""

    def __init__(self, task: Task | None, run: Run, stream: Stream, library: Library, file: Path) -> None:
        self._task, self._run, self._model, self._library, self._file = task, run, stream.model, library, file
        if task is not None and not stream.resident:
            raise PuzzleError(
                f"score.task: needs the whole parent in memory, {format_bytes(sum(stream.layer_bytes))} of layers, and "
                f"beside the candidates {format_bytes(max(0, stream.room(())))} are left; raise execution.memory or "
                "leave score.task out"
            )

    def of_parent(self) -> float | None:
        return None if self._task is None else self._known("parent", lambda: self._model)

    def of_block(self, layer: int, block: BlockVariant) -> float | None:
        """Of the parent with this block in `layer`; None if it is not finite."""
        if self._task is None:
            return None
        state = self._library.block_state
        return self._known(f"layer {layer} {block}", lambda: with_block(self._model, layer, block, state(layer, block)))

    def _known(self, label: str, model: Callable[[], PuzzleForCausalLM]) -> float | None:
        known: dict[str, float | None] = read_json(self._file) if self._file.exists() else {}
        if label not in known:
            assert self._task is not None
            number = _run_task(self._task, model())
            if not math.isfinite(number):
                if label == "parent":
                    raise PuzzleError(f"score.task: {task_name(self._task)} is {number} for the parent itself")
                self._run.log_warning(f"task score of {label} is {number}; it has none")
            known[label] = number if math.isfinite(number) else None
            write_json(self._file, known)
        return known[label]


def _run_task(task: Task, model: PuzzleForCausalLM) -> float:
    value = task(model)
    try:
        if isinstance(value, SupportsFloat):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass  # such as a tensor of several numbers
    raise PuzzleError(f"score.task: {task_name(task)} returned {type(value).__name__}, not a number")


def with_block(model: PuzzleForCausalLM, layer: int, block: BlockVariant, state: State) -> PuzzleForCausalLM:
    """A model that shares its weights with `model` but has `block` in `layer`, so that `model` stays as it is.

    A model of its own, since the KV caches of the layers after one without attention are numbered anew.
    """
    blocks = list(Architecture.of(model.config).blocks)
    blocks[layer] = block
    replaced = empty_model(Architecture(tuple(blocks)).configure(model.config))
    prefix = f"model.layers.{layer}."
    shared = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    own = {prefix + name: tensor.to(model.device, model.dtype) for name, tensor in state.items()}
    replaced.load_state_dict(shared | own, strict=False, assign=True)
    replaced.generation_config = model.generation_config
    return finish(replaced, model.device)
