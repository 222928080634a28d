"""A score of the user's own: a function from a model to a number, the higher the better."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

from puzzle.errors import PuzzleError, one_line
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish
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


def run_task(task: Task, model: PuzzleForCausalLM) -> float:
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
