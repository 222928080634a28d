"""The least-squares update against a plain damped solution."""

import numpy as np
import pytest
import torch
from tests.conftest import random_tokens

from puzzle.library import Statistics, Student
from puzzle.library.students import update_projections
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.streams import LayerPass, Stream
from puzzle.variants import Start, parse_variant
from puzzle.variants.least_squares import RIDGE

CPU = torch.device("cpu")


@pytest.fixture
def text(pico_run: Run, pico_parent: Parent) -> list[LayerPass]:
    stream = Stream(pico_run, pico_parent, pico_run.path / "unused")
    batches = [random_tokens(4, 24, seed) for seed in range(3)]
    return [seen for batch in batches for seen in stream.through(range(4), stream.embed(batch))]


@pytest.fixture
def students(pico_parent: Parent, pico_statistics: Statistics) -> list[Student]:
    own = pico_statistics.parent_subblock(pico_parent, Start(), CPU, 2, "attention")
    variants = [parse_variant("attention", name) for name in ("kv2", "kv1")]
    return [Student(2, [each], pico_parent.config, each.initialise(own), 1.0, CPU) for each in variants]


def projection(student: Student) -> torch.Tensor:
    return student.state()["self_attn.o_proj.weight"]


def test_what_is_not_finite_stays_as_it_is(students: list[Student], text: list[LayerPass]) -> None:
    with torch.no_grad():
        students[0].parameters()["self_attn.v_proj.weight"].fill_(torch.nan)
    before = [projection(student) for student in students]
    update_projections(students, lambda: text, 10**9)
    assert torch.equal(projection(students[0]), before[0])
    assert not torch.equal(projection(students[1]), before[1])


@pytest.mark.parametrize("memory_bytes", [1, 10**9], ids=["one at a time", "together"])
def test_the_update_is_damped_least_squares(memory_bytes: int, students: list[Student], text: list[LayerPass]) -> None:
    expected = []
    for student in students:
        seen = [each for each in text if each.index == 2]
        with torch.no_grad():
            inputs = [student.projection_input(each).flatten(0, 1) for each in seen]
        a = torch.cat(inputs).double().numpy()
        y = torch.cat([each.added_BTD["attention"].flatten(0, 1) for each in seen]).double().numpy()
        before = projection(student).double().numpy()
        rows = np.diag(np.sqrt(RIDGE * (a**2).sum(0)))
        left = np.concatenate([a, rows])
        expected.append(np.linalg.lstsq(left, np.concatenate([y, rows @ before.T]), rcond=None)[0].T)
    update_projections(students, lambda: text, memory_bytes)
    for student, weight in zip(students, expected, strict=True):
        np.testing.assert_allclose(projection(student).numpy(), weight, rtol=1e-3, atol=1e-4)  # float32 products
