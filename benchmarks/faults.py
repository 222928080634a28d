"""Kill a run again and again, at random moments in all stages, and compare what it ends with to an undisturbed one.

    python benchmarks/faults.py PARENT TEXT FOLDER [KILLS]

States are saved after every step, so that a kill can fall between any two. The recipe's target bounds parameters alone,
since measured times must not decide between architectures. One in five is SIGTERM, as preempted machines send it.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from setting import recipe

from puzzle import create_folder

RUN = """
import sys
from pathlib import Path
import torch
import puzzle.distributed.state
import puzzle.training
torch.set_num_threads(1)
puzzle.training.steps_between_looks = lambda seconds: 1
puzzle.distributed.state.SaveTimer.due = lambda timer: True
from puzzle.cli import main
sys.exit(main(["report", sys.argv[1]]))
"""
SECTIONS = {
    "data": {"sequence_length": 64, "max_tokens": "400k"},
    "space": {"kv_heads": [1], "ffn_widths": [128], "attention": ["linear"], "ffn": ["none"]},
    "calibration": {"tokens": 4096},
    "library": {"tokens": 4096, "validation_tokens": 1024, "batch_size": 4},
    "score": {"tokens": 512},
    "scenario": {"batch_sizes": [2], "prompt_tokens": 16, "generated_tokens": 8},
    "cost": {"repeats": 2},
    "target": {"throughput": None, "parameters": "80%"},
    "refine": {"tokens": 1024, "batch_size": 4},
    "distil": {"tokens": 4096, "batch_size": 4, "validation_tokens": 1024},
    "evaluate": {"tokens": 2048, "uniform_baseline": False},
}
AHEAD = 3
"""A kill falls into one of so many stages that are not finished yet."""
COMPARED = ("variants/*.safetensors", "stages/*/checkpoint/*.safetensors", "child/*.safetensors")


def main(parent: str, text: str, folder: str, kills: str = "50") -> None:
    """Print a line for each kill and each finished run, and at last the counts."""
    root, moments = Path(folder), random.Random(0)
    root.mkdir(parents=True)
    undisturbed = fresh(root / "undisturbed", parent, text)
    assert start(undisturbed).wait() == 0
    seconds = stage_seconds(undisturbed)
    print(f"undisturbed: {seconds}", flush=True)
    hit: Counter[str] = Counter()
    runs = different = 0
    while hit.total() < int(kills):
        disturbed = fresh(root / f"disturbed-{runs}", parent, text)
        here: set[str] = set()
        while (stage := disturb(disturbed, moments, seconds, here)) is not None:
            hit[stage] += 1
            here.add(stage)
            print(f"kill {hit.total()} in {stage}", flush=True)
        found = differences(undisturbed, disturbed)
        runs, different = runs + 1, different + bool(found)
        print(f"run {runs} ended: {found or 'the same architecture, the same weights'}", flush=True)
        shutil.rmtree(disturbed)
    print(json.dumps({"kills": hit.total(), "runs": runs, "different": different, "by stage": dict(hit)}))


def fresh(folder: Path, parent: str, text: str) -> Path:
    """A new run folder."""
    create_folder(folder, recipe(parent, text, **SECTIONS))
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def disturb(folder: Path, moments: random.Random, seconds: dict[str, float], hit: set[str]) -> str | None:
    """Go on with a run and kill it in one of its next stages: which that was; None if it came to its end first.

    Args:
        hit: stages that this run was killed in before: one that takes less than a start would never end.
    """
    began, process = time.time(), start(folder)
    ahead = [stage for stage in seconds if stage not in hit and not finished(folder, stage)]
    chosen = moments.choice(ahead[:AHEAD]) if ahead else ""
    delay, gentle = moments.uniform(0, seconds.get(chosen, 0)), moments.random() < 0.2
    while process.poll() is None and not worked_on(folder, chosen, began):
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is None:
        open_ones = (stage for stage in seconds if worked_on(folder, stage, began) and not finished(folder, stage))
        stage = next(open_ones, "between stages")
        process.send_signal(signal.SIGTERM if gentle else signal.SIGKILL)
        process.wait()
        # A gentle one may come when all is done, or so early that Python itself answers it.
        assert process.returncode in ((130, 0, -signal.SIGTERM) if gentle else (-signal.SIGKILL, 0)), process.stderr
        return stage
    assert process.returncode == 0, process.communicate()[1].decode()
    return None


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a finished run took, in their order."""
    manifests = sorted(folder.glob("stages/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return {name_of(path.parent): json.loads(path.read_text())["seconds"] for path in manifests}


def name_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


def worked_on(folder: Path, stage: str, since: float) -> bool:
    """Whether an attempt at this stage has begun since then."""
    return any(clock.stat().st_mtime >= since for clock in folder.glob(f"stages/{stage}-*/clock.json"))


def finished(folder: Path, stage: str) -> bool:
    """Whether all that was begun of this stage is done: it may be there twice, as searches are."""
    folders = [path for path in folder.glob("stages/*") if name_of(path) == stage]
    return bool(folders) and all((path / "manifest.json").exists() for path in folders)


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """What the two runs ended with differently."""
    found = []
    if (disturbed / "architecture.json").read_text() != (undisturbed / "architecture.json").read_text():
        found.append("architecture.json")
    for pattern in COMPARED:
        expected = {path.relative_to(undisturbed): path for path in undisturbed.glob(pattern)}
        assert expected, pattern
        found += [f"{name}" for name, path in expected.items() if not equal(path, disturbed / name)]
    return found


def equal(expected: Path, found: Path) -> bool:
    if not found.exists():
        return False
    own, other = load_file(expected), load_file(found)
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


if __name__ == "__main__":
    main(*sys.argv[1:])
