"""The refit against a plain damped least-squares solution."""

import numpy as np
import pytest
import torch
from tests.conftest import random_tokens

from puzzle.blocks import GroupedQuery, Start
from puzzle.blocks.linear import RIDGE
from puzzle.library import Library, Statistics
from puzzle.library.groups import parent_subblock
from puzzle.library.refit import refit
from puzzle.library.students import SubblockStudent
from puzzle.parents import LayerPass, Parent, ParentPasses
from puzzle.runs import Run


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
