"""A score of the user's own: a function from a model to a number, the higher the better."""

import math
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from puzzle.errors import PuzzleError, one_line
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish
from puzzle.runs import Run, read_json, write_json
from puzzle.variants import Architecture, BlockVariant

Task = Callable[[PuzzleForCausalLM], float]


def load_task(text: str) -> Task:
    """The function `module:function`; modules are also looked for where the command is run."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = pkgutil.resolve_name(text)
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
    if not hasattr(task, "__qualname__"):
        raise PuzzleError("score.task: found a callable without a name; give a function")
    return f"{task.__module__}:{task.__qualname__}"


def task_score(run: Run, task: Task, file: Path, label: str, model: Callable[[], PuzzleForCausalLM]) -> float | None:
    """The task's number of the model `label`, kept in `file` over restarts; None if it is not finite."""
    known: dict[str, float | None] = read_json(file) if file.exists() else {}
    if label not in known:
        value = task(model())
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # such as a tensor of several numbers
            raise PuzzleError(f"score.task: {task_name(task)} returned {type(value).__name__}, not a number") from None
        if not math.isfinite(number):
            if label == "parent":
                raise PuzzleError(f"score.task: {task_name(task)} is {number} for the parent itself")
            run.log_warning(f"task score of {label} is {number}; it has none")
        known[label] = number if math.isfinite(number) else None
        write_json(file, known)
    return known[label]


def with_block(model: PuzzleForCausalLM, layer: int, block: BlockVariant, library: Library) -> PuzzleForCausalLM:
    """A model that shares its weights with the parent `model` but has `block` in `layer`; `model` stays as it is.

    A model of its own, since the KV caches of the layers after one without attention are numbered anew.
    """
    blocks = list(Architecture.of(model.config).blocks)
    if block == blocks[layer]:
        return model
    blocks[layer] = block
    replaced = empty_model(Architecture(tuple(blocks)).configure(model.config))
    prefix, state = f"model.layers.{layer}.", library.block_state(layer, block)
    shared = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
    own = {prefix + name: tensor.to(model.device, model.dtype) for name, tensor in state.items()}
    replaced.load_state_dict(shared | own, strict=False, assign=True)
    replaced.generation_config = model.generation_config
    return finish(replaced, model.device)
