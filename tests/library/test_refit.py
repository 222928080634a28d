"""The refit against a plain damped least-squares solution."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import random_tokens
from torch import nn

from puzzle.library import Library, Statistics
from puzzle.library.groups import parent_subblock
from puzzle.library.refit import _groups, refit
from puzzle.library.students import SubblockStudent
from puzzle.parents import LayerPass, Parent, ParentPasses
from puzzle.runs import Run
from puzzle.variants import GroupedQuery, Start
from puzzle.variants.least_squares import RIDGE


def test_what_is_not_finite_stays_as_it_is(
    pico_run: Run, pico_parent: Parent, pico_statistics: Statistics, pico_library: Library
) -> None:
    passes = ParentPasses(pico_run, pico_parent, pico_run.path / "unused")
    own = parent_subblock(pico_parent, pico_statistics, Start(), 2, "attention", torch.device("cpu"))
    students = [
        SubblockStudent(2, variant, pico_parent.config, variant.initialise(own), 1.0, torch.device("cpu"))
        for variant in (GroupedQuery(2), GroupedQuery(1))
    ]
    with torch.no_grad():
        students[0].parameters()["self_attn.v_proj.weight"].fill_(torch.nan)
    before = [student.states()[student.variant.name]["self_attn.o_proj.weight"] for student in students]
    refit(students, lambda: list(passes.through(range(4), "text", 0, random_tokens(4, 24))), 10**9)
    after = [student.states()[student.variant.name]["self_attn.o_proj.weight"] for student in students]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_as_many_students_as_fit_the_memory_share_a_pass() -> None:
    inputs = (10, 20, 20, 10)
    maps = [nn.Linear(each, 10, device="meta") for each in inputs]
    students: list[Any] = [SimpleNamespace(projections=lambda each=each: {"w": each}) for each in maps]
    needed = [8 * each * (each + 10) for each in inputs]
    assert [len(group) for group in _groups(students, sum(needed) + 2 * needed[1])] == [4]
    assert [len(group) for group in _groups(students, sum(needed) + 2 * needed[1] - 1)] == [3, 1]
    assert [len(group) for group in _groups(students, -1)] == [1, 1, 1, 1]


@pytest.mark.parametrize("memory_bytes", [1, 10**9], ids=["one at a time", "together"])
def test_the_refit_is_damped_least_squares(
    memory_bytes: int, pico_run: Run, pico_parent: Parent, pico_statistics: Statistics, pico_library: Library
) -> None:
    passes = ParentPasses(pico_run, pico_parent, pico_run.path / "unused")
    batches = [random_tokens(4, 24, seed) for seed in range(3)]

    def calibration() -> list[LayerPass]:
        return [seen for i, batch in enumerate(batches) for seen in passes.through(range(4), "text", i, batch)]

    own = parent_subblock(pico_parent, pico_statistics, Start(), 2, "attention", torch.device("cpu"))
    students = [
        SubblockStudent(2, variant, pico_parent.config, variant.initialise(own), 1.0, torch.device("cpu"))
        for variant in (GroupedQuery(2), GroupedQuery(1))
    ]
    expected = []
    for student in students:
        seen = [each for each in calibration() if each.index == 2]
        with torch.no_grad():
            inputs = [student.projection_inputs(each)[student.variant.name].flatten(0, 1) for each in seen]
        a = torch.cat(inputs).double().numpy()
        y = torch.cat([each.attention_BTD.flatten(0, 1) for each in seen]).double().numpy()
        before = student.projections()[student.variant.name].weight.detach().double().numpy()
        rows = np.diag(np.sqrt(RIDGE * (a**2).sum(0)))
        expected.append(
            np.linalg.lstsq(np.concatenate([a, rows]), np.concatenate([y, rows @ before.T]), rcond=None)[0].T
        )
    refit(students, calibration, memory_bytes)
    for student, weight in zip(students, expected, strict=True):
        found = student.projections()[student.variant.name].weight.detach().numpy()
        np.testing.assert_allclose(found, weight, rtol=1e-3, atol=1e-4)  # float32 products
