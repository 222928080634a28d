"""Tasks of lm-eval: what people know models by, asked of parent and children alike (docs/numbers.md)."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from math import fsum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from puzzle.artefacts import TaskScore
from puzzle.child import Child
from puzzle.device import release_memory, task_batch_size
from puzzle.errors import PuzzleError, one_line
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress
from puzzle.stages import TASKS

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

_HEADLINES = ("acc_norm", "acc", "exact_match")
"""Of a task's metrics, the one that stands for it; without these, its first."""


@dataclass(frozen=True)
class Task:
    """An entry of `evaluate.tasks`, loaded: a task, a group or a tag of lm-eval."""

    name: str
    identity: str
    """Hash of its questions, and of how they are asked and marked."""
    loaded: dict[str, Any]
    """As `TaskManager.load` gives it."""


def check_tasks(entries: Sequence[str]) -> list[tuple["TaskManager", Path | None, str]]:
    """Of every task that `evaluate.tasks` stands for, lm-eval's reader, its own folder if it has one, and its name.

    A `PuzzleError` if one of them is not there, or lm-eval is not; nothing else is loaded.
    """
    if entries and find_spec("lm_eval") is None:
        raise PuzzleError("evaluate.tasks: lm-eval is not installed; pip install 'puzzle-llm[eval]'")
    found = []
    for entry in entries:
        path = Path(entry).expanduser().absolute()
        folder = path if path.is_dir() else path.parent if path.is_file() else None
        manager = _manager(folder) if folder else _lm_evals_own()
        files = {name: each.yaml_path for name, each in manager.task_index.items()}
        names = [name for name, file in files.items() if file and path in (file, file.parent)] if folder else [entry]
        if not names or names[0] not in files:
            give = "give a name that `lm-eval ls tasks` lists, a yaml file of your own, or a folder of them"
            raise PuzzleError(f"evaluate.tasks: found {entry}, which is no task; {give}")
        found += [(manager, folder, name) for name in names]
    return found


def _manager(folder: Path | None) -> "TaskManager":
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstraps must not fork a process that has threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    return TaskManager(include_path=folder, include_defaults=folder is None)


_lm_evals_own = cache(partial(_manager, None))  # to find them takes seconds


def load_tasks(entries: Sequence[str]) -> list[Task]:
    """Tasks with their questions; paths in a yaml file of your own are relative to its folder."""
    tasks = []
    for manager, folder, name in check_tasks(entries):
        try:
            with chdir(folder or Path.cwd()):
                loaded: dict[str, Any] = dict(manager.load([name]))
            asked = {}
            for leaf, task in loaded["tasks"].items():
                task.set_fewshot_seed(1234)  # as lm-eval's own command has it
                config = task.dump_config()
                (config.get("metadata") or {}).pop("config_source", None)  # where its file lies
                asked[leaf] = [config, *task.eval_docs]
        except Exception as error:  # whatever a task's code or the hub client raises, the reader needs one line
            raise PuzzleError(f"evaluate.tasks: {name} cannot be loaded ({one_line(error)})") from None
        if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise PuzzleError(f"evaluate.tasks: {name} runs code that a model wrote; take it out")
        identity = digest(json.dumps([version("lm-eval"), asked], sort_keys=True, default=str))
        tasks.append(Task(name, identity, loaded))
    return tasks


def run_tasks(run: Run, label: str, model: Parent | Child, tasks: Sequence[Task]) -> dict[str, TaskScore]:
    """What a model reaches in every task, each in a folder of its own: what is done is kept. It must fit in memory."""
    scores, loaded = dict[str, TaskScore](), cache(partial(_loaded, run, model))
    for task in tasks:
        stage = run.open(TASKS, model=model, task=task.identity)
        if not stage.done:
            found = _asked(loaded(), task, label, run.path / "requests" / task.identity[:12])
            stage.commit(scores={name: asdict(score) for name, score in found.items()})
            run.log(f"{label}: " + ", ".join(f"{name} {score}" for name, score in found.items()))
        scores |= {name: TaskScore(**values) for name, values in stage.facts["scores"].items()}
    loaded.cache_clear()
    release_memory()
    return scores


def _loaded(run: Run, model: Parent | Child) -> "HFLM":
    from lm_eval.models.huggingface import HFLM

    source = model.source() if isinstance(model, Child) else model
    return HFLM(
        pretrained=source.load(dtype=getattr(torch, run.recipe.precision), device=run.device),
        tokenizer=source.tokenizer(),
        batch_size=task_batch_size(run.device),
        softmax_dtype="float32",
    )


def _asked(lm: "HFLM", task: Task, label: str, requests: Path) -> dict[str, TaskScore]:
    """The scores of a task, or of a tag's tasks. In the folder `requests` they are told by the task's name alone."""
    from lm_eval.caching import cache as kept
    from lm_eval.evaluator import evaluate

    def shown(kind: str, questions: Sequence[Any]) -> Any:
        with progress(f"{task.name}, {label}", len(questions)) as bar:
            lm.set_cache_hook(SimpleNamespace(add_partial=lambda *_: bar.advance()))
            return getattr(type(lm), kind)(lm, questions, disable_tqdm=True)

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, partial(shown, kind))
    kept.PATH = str(requests)
    # Resamples are for standard errors that have no formula, such as perplexity's.
    results = evaluate(lm, task.loaded, cache_requests=True, bootstrap_iters=1000, log_samples=False)
    names = [task.name] if task.name in results.get("groups", {}) else task.loaded["tasks"]
    return {name: _score(results, name, task.loaded) for name in names}


def _score(results: dict[str, Any], name: str, loaded: dict[str, Any]) -> TaskScore:
    """Out of lm-eval's results, whose keys are such as `acc,none` and `acc_stderr,none`."""
    row, metrics = results["results"][name], dict[str, tuple[float, float | None]]()
    for key in row:
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = row.get(f"{metric}_stderr,{how}")  # "N/A" where nobody knows it
            label = metric if how == "none" else f"{metric}, {how}"
            metrics[label] = float(row[key]), None if isinstance(error, str) else error
    headline = next((metric for metric in _HEADLINES if metric in metrics), next(iter(metrics)))
    chance = None
    if results["higher_is_better"][name].get(headline.partition(",")[0]):
        leaves = loaded["groups"][name].get_all_tasks() if name in loaded["groups"] else [loaded["tasks"][name]]
        chosen = (task for task in leaves if task.OUTPUT_TYPE == "multiple_choice" and headline.startswith("acc"))
        guessed = fsum(1 / len(task.doc_to_choice(doc)) for task in chosen for doc in task.eval_docs)
        chance = guessed / row["sample_len"]
    return TaskScore(headline, *metrics[headline], chance, row["sample_len"], metrics)
