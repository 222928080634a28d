"""Stages on a Ray cluster of simulated machines, one of which is lost (laws 11 and 12)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from puzzle.distill import distil
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline, run_stage
from puzzle.runs import Run, open_run

ray: Any = pytest.importorskip("ray")
from ray.cluster_utils import Cluster as Machines  # noqa: E402

from puzzle.distributed.group import Group  # noqa: E402
from puzzle.distributed.ray import Cluster, train_on_cluster  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,  # else whatever else the machine does goes before
}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head without CPUs, and two machines of one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whatever the person who runs the tests has set
        size = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Machines(True, head_node_args={"num_cpus": 0, "_system_config": FAST, **size})
        for _ in range(2):
            cluster.add_node(num_cpus=1, **size)
        cluster.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def on_ray(pico_run: Run, machines: Machines) -> Run:
    return Run(pico_run.path, pico_run.recipe, on="ray")


def test_a_task_whose_process_is_lost_is_begun_again(on_ray: Run, tmp_path: Path) -> None:
    def dies_once(name: str) -> None:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / name).write_text(f"{Path.cwd()} {torch.get_num_threads()}")

    cluster = Cluster(on_ray)
    assert cluster.workers == 2
    cluster.run("test", dies_once, [("a",), ("b",), ("c",)])
    for name in ("a", "b", "c"):
        assert (tmp_path / name).read_text() == f"{Path.cwd()} {torch.get_num_threads()}"


def test_an_error_of_a_task_is_that_of_the_command(on_ray: Run) -> None:
    def fails(item: int) -> None:
        raise PuzzleError(f"setting: found {item}; mend it")

    with pytest.raises(PuzzleError, match=r"^setting: found 1; mend it$"):
        Cluster(on_ray).run("test", fails, [(1,)])


@pytest.mark.parametrize("on", ["ray://127.0.0.1:1", "ray://127.0.0.1", "ray://nowhere.invalid:6379", "slurm"])
def test_a_cluster_that_is_not_there_is_said_so_at_once(pico_run: Run, on: str) -> None:
    ray.shutdown()
    with pytest.raises(PuzzleError, match=rf"^--on: found '{on}', and this machine cannot join .*ray status"):
        Cluster(Run(pico_run.path, pico_run.recipe, on=on))


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "found 'cuda:1'; for a cluster, leave it at"), ("cuda", "no machine of the cluster has a GPU")],
)
def test_a_device_that_the_cluster_does_not_have(on_ray: Run, device: str, message: str) -> None:
    execution = on_ray.recipe.execution.model_copy(update={"device": device})
    run = Run(on_ray.path, on_ray.recipe.model_copy(update={"execution": execution}), on="ray")
    with pytest.raises(PuzzleError, match=rf"execution.device: .*{message}"):
        Cluster(run)


def test_an_error_of_one_that_trains_is_that_of_the_command(on_ray: Run) -> None:
    def fails(run: Run) -> None:
        raise PuzzleError("setting: found 1; mend it")

    with pytest.raises(PuzzleError, match=r"^setting: found 1; mend it$"):
        train_on_cluster(on_ray, fails, 2)


def test_gkd_on_a_cluster_is_that_of_one_process_also_after_a_stop_and_a_death(
    pico_run: Run, machines: Machines, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for path in (here, there):
        shutil.copytree(pico_run.path, path, ignore=shutil.ignore_patterns("distil-*", ".lock"))
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        recipe["distil"] |= {"tokens": 60 * 4 * 32, "batch_size": 4}
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with open_run(here) as run:
        run_stage(run, "distil")
    command = [sys.executable, "-m", "puzzle", "distil", str(there), "--on", "ray"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(there.glob("stages/distil-*/curve.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "GKD on 2 of 2 workers" in said
    assert not list(there.glob("stages/distil-*/manifest.json"))

    with open_run(there) as run:
        pipeline = Pipeline(run)
        inputs = (pipeline.parent, pipeline.child_refined, pipeline.data)

    def dies_once(run: Run) -> None:
        if Group.current().rank == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").write_text(f"{Path.cwd()} {torch.get_num_threads()}")
            os.kill(os.getpid(), signal.SIGKILL)
        distil(run, *inputs)

    with open_run(there, on="ray") as run:
        train_on_cluster(run, dies_once, 4)
    assert (tmp_path / "died").read_text() == f"{Path.cwd()} {torch.get_num_threads()}"
    (expected,), (found,) = (path.glob("stages/distil-*/checkpoint/model.safetensors") for path in (here, there))
    assert expected.relative_to(here) == found.relative_to(there)
    torch.testing.assert_close(load_file(found), load_file(expected), rtol=0, atol=1e-3)
    assert not (there / "ray").exists()


def test_with_one_of_two_machines_lost_variants_and_scores_are_those_of_one_process(
    pico_run: Run, machines: Machines, tmp_path: Path
) -> None:
    here, there = _fresh_copy(pico_run, tmp_path / "here"), _fresh_copy(pico_run, tmp_path / "there")
    command = [sys.executable, "-m", "puzzle", "score", str(there), "--on", "ray"]
    with open_run(here) as run:
        run_stage(run, "score")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    # Both machines are in the library: the later layers' has its inputs, and none is at its end.
    while not list(there.glob("stages/library-*/part002-004/activations/validation/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    assert len(list(there.glob("variants/*"))) < len(list(here.glob("variants/*"))) / 2
    machines.remove_node(machines.list_all_nodes()[-1], allow_graceful=False)
    assert process.wait() == 0
    expected = {str(file.relative_to(here)): file for file in here.glob("variants/*")}
    assert {str(file.relative_to(there)) for file in there.glob("variants/*")} == expected.keys()
    for pattern in ("variants/*", "stages/calibrate-*/layer*", "stages/score-*/layer*", "stages/score-*/scores.json"):
        assert len(list(here.glob(pattern))) >= 1
        for file in here.glob(pattern):
            _equal(file, there / file.relative_to(here))
    assert not list(there.glob("stages/*/part*"))


def _fresh_copy(run: Run, folder: Path) -> Path:
    """A run folder of the same recipe, with more to train, and with its tokens."""
    folder.mkdir()
    shutil.copy(run.path / "puzzle.json", folder)
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    recipe["library"]["tokens"] = 32_768
    recipe["execution"] = {"threads": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def _equal(expected: Path, found: Path) -> None:
    if expected.suffix != ".safetensors":
        assert found.read_bytes() == expected.read_bytes(), expected
        return
    tensors, others = load_file(expected), load_file(found)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors), expected
