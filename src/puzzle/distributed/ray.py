"""Tasks, and the processes of GKD, on a Ray cluster. The work of a lost process or machine is started again.

Every machine has this program installed, and sees the run folder, the parent and the text under the same paths.
"""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from puzzle.device import collective_backend
from puzzle.distributed.group import TIMEOUT, is_lost_peer
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import Run, progress

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError:
    raise PuzzleError("--on: ray is not installed; pip install 'puzzle-llm[ray]', on every machine") from None

_RETRIES = 10
"""Restarts of a task or a training after its process or machine was lost."""

_FILES = "ray"
"""Ray Train's own folder in the run folder; deleted afterwards."""


class Cluster:
    """The cluster that `run.on` names: `ray` is the one of this machine, or this machine alone if it is in none;
    `ray://HOST:6379` is the one with that head, to which this machine belongs too.

    The command is a process of the cluster and no Ray Client, which gives up 30 s after losing its connection.

    A worker is one GPU; where the cluster has none or `execution.device` is `cpu`, it is as many CPUs as this process
    has threads, so that sums are in the same order as here.
    """

    def __init__(self, run: Run) -> None:
        _connect(str(run.on))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device, gpus = run.recipe.execution.device, int(sum(node.get("GPU", 0) for node in nodes))
        if device not in ("auto", "cpu", "cuda"):
            raise PuzzleError(f"execution.device: found {device!r}; for a cluster, leave it at auto, cpu or cuda")
        if device == "cuda" and not gpus:
            raise PuzzleError("execution.device: found 'cuda', and no machine of the cluster has a GPU")
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        on_gpus = gpus > 0 and device != "cpu"
        room = sum(cpus) // gpus if on_gpus else max(cpus, default=0)
        self._threads = max(1, min(torch.get_num_threads(), room))
        self.workers = gpus if on_gpus else sum(count // self._threads for count in cpus)
        self._on_gpus, self._folder = on_gpus, run.path
        if not self.workers:
            raise PuzzleError(f"--on: the cluster {run.on} offers neither GPUs nor CPUs; start a worker machine")

    def run(self, label: str, function: Callable[..., object], items: Sequence[tuple[Any, ...]]) -> None:
        """Call `function` on every item. An error in one ends all; items of lost processes are started again."""
        # Ray ends a process after a task on a GPU, so that the next one finds the memory free.
        resources = {"num_gpus": 1, "num_cpus": 1} if self._on_gpus else {"num_cpus": self._threads}
        work = ray.remote(max_retries=_RETRIES, **resources)(_work)
        shared = ray.put(function)
        waiting = [work.remote(Path.cwd(), self._threads, shared, item) for item in items]
        try:
            with progress(f"{label} on {min(self.workers, len(items))} workers", len(items)) as bar:
                while waiting:
                    done, waiting = ray.wait(waiting)
                    ray.get(done)
                    bar.advance(len(done))
        except RayTaskError as error:
            cause = cast(Exception, error.cause)
            if not isinstance(cause, PuzzleError):
                cause.add_note(str(error))  # the traceback over there
            raise cause from None
        except RayError as error:
            raise PuzzleError(
                f"--on: a task of {label} was lost {_RETRIES + 1} times ({one_line(error)}); look at the machines "
                "(memory?), then run the same command again: it goes on where it stood"
            ) from None
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    def together(self, function: Callable[[], object], size: int) -> None:
        """Call `function` in `size` processes at once, a `Group`, by Ray Train.

        Raises:
            LostProcessError: one was lost, and all were ended.
        """
        backend = collective_backend(torch.device("cuda" if self._on_gpus else "cpu"))
        trainer = _Trainer(
            partial(_work, Path.cwd(), self._threads, function, ()),
            torch_config=TorchConfig(backend=backend, timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=self._on_gpus,
                resources_per_worker={"CPU": 1 if self._on_gpus else self._threads},
            ),
            run_config=RunConfig(name=_FILES, storage_path=str(self._folder.absolute())),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from None
        finally:
            shutil.rmtree(self._folder / _FILES, ignore_errors=True)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    def _register_sigint_handler(self, controller: object) -> None:
        """Ray's own handler would swallow Ctrl-C."""


class LostProcessError(Exception):
    """A process of a group, or its machine, is gone."""


def train_together(run: Run, function: Callable[[], object], sequences: int) -> None:
    """Call `function` on as many workers of the cluster as divide `sequences`; again if one is lost, on those left.

    Raises:
        PuzzleError: the function raised it, or processes were lost too often.
    """
    for _ in range(_RETRIES + 1):
        cluster = Cluster(run)
        size = max(count for count in range(1, cluster.workers + 1) if sequences % count == 0)
        run.log(f"GKD on {size} of {cluster.workers} workers")
        try:
            return cluster.together(function, size)
        except LostProcessError as lost:
            run.log_warning(f"a process was lost ({one_line(lost)}); training goes on from its last saved state")
            ray.shutdown()  # only this frees what Ray Train reserved
    raise PuzzleError(
        f"--on: processes were lost {_RETRIES + 1} times; look at the machines (memory?), then run the same command "
        "again: it goes on where it stood"
    )


def _cause(error: TrainingFailedError) -> Exception:
    """The error of a process itself, or `LostProcessError` where one was lost."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    # A lost process is Ray's error; the others report a broken connection to it.
    own = [each for each in failures if not type(each).__module__.startswith("ray.") and not is_lost_peer(each)]
    mistakes = [failure for failure in own if isinstance(failure, PuzzleError)]
    if mistakes:
        return mistakes[0]
    if not own or len(own) < len(failures):
        return LostProcessError(one_line(error))
    own[0].add_note(str(error))  # the traceback over there
    return own[0]


def _work(folder: Path, threads: int, function: Callable[..., object], item: tuple[Any, ...]) -> None:
    """Runs in a worker, in the folder of the command, since paths in recipes may be relative."""
    if not folder.is_dir():
        raise PuzzleError(f"--on: {os.uname().nodename} has no folder {folder}; machines must share a file system")
    os.chdir(folder)
    torch.set_num_threads(threads)
    function(*item)


def _connect(on: str) -> None:
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = on.removeprefix("ray").removeprefix("://")
    try:
        if address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or None)
    except (RayError, OSError, ImportError, ValueError, RuntimeError) as error:
        raise PuzzleError(
            f"--on: found {on!r}, and this machine cannot join such a cluster ({one_line(error)}); see `ray status`, "
            "and whether RAY_AUTH_MODE is that of the cluster"
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would exit without our cleanup
