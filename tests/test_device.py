"""One place for the device: nobody else asks what kind it is."""

import re
import time
from pathlib import Path

import pytest
import torch

import puzzle
from puzzle import device
from puzzle.errors import PuzzleError

CPU = torch.device("cpu")
OTHERS = {"device.py", "modeling/modeling_puzzle.py", "modeling/configuration_puzzle.py"}
WORKER = "costs/worker.py"
"""Runs in the engines' own environments, without this package."""


def test_no_other_file_asks_for_the_kind_of_a_device() -> None:
    root = Path(puzzle.__file__).parent
    asking = re.compile(r"\bdevice\.type\b|\btorch\.cuda\b|\bis_cuda\b|\btorch\.accelerator\b|\btorch\.backends\b")
    files = {str(file.relative_to(root)): file.read_text() for file in root.rglob("*.py")}
    assert files.keys() >= OTHERS
    found = [name for name, text in files.items() if asking.search(text) and name not in OTHERS]
    assert [name for name in found if name != WORKER] == []


def test_a_device_that_torch_cannot_use_is_named() -> None:
    assert device.choose_device("cpu") == CPU
    with pytest.raises(PuzzleError, match=r"^execution\.device: found 'warp', which torch cannot use here"):
        device.choose_device("warp")


def test_budgets_are_those_allowed_or_a_share_of_what_is_free(tmp_path: Path) -> None:
    assert device.memory_bytes(CPU, 123) == device.disk_bytes(tmp_path, 123) == 123
    assert 0 < device.memory_bytes(CPU) < 2**50
    assert device.disk_bytes(tmp_path) > 0


def test_work_is_timed_call_by_call() -> None:
    times = device.times_ms(CPU, lambda: time.sleep(0.02) or sum(range(10**5)), 3)
    assert len(times) == 3
    assert min(times) > 0
    assert device.flops_per_second(CPU, torch.float32) > 1e8


def test_float32_products_of_bfloat16_matrices_are_not_rounded() -> None:
    torch.manual_seed(0)
    rows_ND, weight_VD = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    found = device.float32_product(rows_ND, device.float32_operand(weight_VD))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), rows_ND.double() @ weight_VD.double().T, rtol=1e-5, atol=1e-5)


def test_slow_steps_are_looked_at_more_often() -> None:
    assert [device.steps_between_looks(seconds) for seconds in (0.0, 0.01, 2.0, 60.0)] == [16, 16, 5, 1]
