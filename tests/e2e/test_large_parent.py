"""Calibration, BLD and scoring of a parent that is larger than the memory that the process may have."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import pico_llama, save_byte_tokenizer, write_pico_text

from puzzle.artefacts import LibraryIndex, ScoreTable
from puzzle.recipe import Recipe
from puzzle.runs import create_folder, read_tensors

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of data are Linux's")

ROOM_BYTES = 80 * 2**20
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from puzzle import Pipeline, open_run

torch.set_num_threads(1)
with open_run(Path(sys.argv[1])) as run:
    method = Pipeline(run)
    method.data, method.space
    torch.ones(300, 300) @ torch.ones(300, 300)  # what threads and kernels take
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1])
    if sys.argv[2] != "0":
        limit = now + int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            method.parent.load()
        except (MemoryError, RuntimeError):
            print("the whole parent does not fit")
    method.statistics, method.subblock_library, method.subblock_scores
"""


def test_a_parent_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    model = pico_llama(
        vocab_size=257, hidden_size=768, intermediate_size=512, num_hidden_layers=18, initializer_range=0.05
    )
    # In parts as large parents are, for a file that is read counts as memory, all of it, while it is open.
    model.to(torch.bfloat16).save_pretrained(parent, max_shard_size="5MB")
    size = 2 * sum(file.stat().st_size for file in parent.glob("*.safetensors"))  # in float32
    assert size > ROOM_BYTES + 2**23
    save_byte_tokenizer(parent)
    write_pico_text(tmp_path / "text.jsonl")
    limited, unlimited = tmp_path / "limited", tmp_path / "unlimited"
    output = run(limited, parent, {"memory": "25MB", "disk": "100MB"}, ROOM_BYTES)
    assert "the whole parent does not fit" in output
    run(unlimited, parent, {}, 0)
    for layer in range(18):
        file = f"stages/calibrate-*/layer{layer:03d}.safetensors"
        moments, others = (read_tensors(next(folder.glob(file))) for folder in (limited, unlimited))
        assert moments.keys() == others.keys()
        assert all(torch.equal(moments[name], others[name]) for name in moments)
    read = LibraryIndex.from_json
    assert one(limited, "stages/library-*/index.json", read) == one(unlimited, "stages/library-*/index.json", read)
    found, expected = (
        one(folder, "stages/score-*/scores.json", ScoreTable.from_json) for folder in (limited, unlimited)
    )
    assert len(found.rows) == len(expected.rows) == 18 * 4
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row.block == other.block
        assert row.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)


def run(folder: Path, parent: Path, execution: dict[str, Any], room_bytes: int) -> str:
    """The stages in a process of their own; what it printed."""
    recipe = {
        "parent": str(parent),
        "data": {"source": str(parent.parent / "text.jsonl"), "sequence_length": 32, "scoring": 0.1},
        "precision": "float32",
        "space": {"kv_heads": [2], "ffn_widths": [64], "attention": [], "ffn": []},
        "calibration": {"tokens": 256},
        "library": {"tokens": 128, "batch_size": 2, "validation_tokens": 64, "channels": "independent"},
        "score": {"tokens": 64},
        "target": {"parameters": "90%"},
        "execution": execution,
    }
    create_folder(folder, Recipe.model_validate(recipe))
    command = [sys.executable, "-c", LIMITED, str(folder), str(room_bytes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if room_bytes:  # the allocator gives back at once what is freed
        environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def one(folder: Path, pattern: str, read: Any) -> Any:
    (file,) = folder.glob(pattern)
    return read(file.read_text())
