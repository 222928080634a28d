"""Least squares for the last linear map of many students at once, on calibration text.

The map W from its input a to the subblock's contribution y is linear, so for everything before it as it is, the best is
W0 + (E[y a^T] - W0 C) (C + damping)^-1 with C = E[a a^T]: the present map W0, and what that leaves. A bias stays.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from puzzle.library.students import Student
from puzzle.parents import LayerPass
from puzzle.variants import Subblock, damping

Seen = Callable[[], Iterable[LayerPass]]
"""A pass over calibration text: every layer of every batch."""


@torch.no_grad()
def refit(students: Sequence[Student], calibration: Seen, memory_bytes: int) -> None:
    """Set the students' projections to their optimum, in passes over as many students as fit the memory.

    What became infinite or NaN stays as it is.
    """
    for group in _groups(students, memory_bytes):
        moments = {student.name: _Moments(student) for student in group}
        for seen in calibration():
            for student in group:
                if student.layer == seen.index:
                    moments[student.name].add(seen)
        for each in moments.values():
            each.solve()


class _Moments:
    """E[a a^T] and E[(y - b) a^T] of every projection of one student; products in float32, sums in float64."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._second: dict[str, Tensor] = {}
        self._cross: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, seen: LayerPass) -> None:
        subblock: Subblock = "attention" if self._student.subblock == "attention" else "ffn"
        output_ND = seen.contribution(subblock).float().flatten(0, 1)
        self._tokens += len(output_ND)
        projections = self._student.projections()
        for name, input_BTI in self._student.projection_inputs(seen).items():
            bias = projections[name].bias
            wanted_ND = output_ND if bias is None else output_ND - bias
            input_NI = input_BTI.float().flatten(0, 1)
            second, cross = (input_NI.T @ input_NI).double(), (wanted_ND.T @ input_NI).double()
            if name in self._second:
                second, cross = second.add_(self._second[name]), cross.add_(self._cross[name])
            self._second[name], self._cross[name] = second, cross

    def solve(self) -> None:
        for name, projection in self._student.projections().items():
            second, cross = self._second.pop(name).div_(self._tokens), self._cross.pop(name).div_(self._tokens)
            weight = projection.weight.double()
            left = cross - weight @ second
            second.diagonal().add_(damping(second))
            solved = weight + torch.linalg.solve(second, left.T).T
            if solved.isfinite().all():
                projection.weight.copy_(solved)


def _groups(students: Sequence[Student], memory_bytes: int) -> Iterator[list[Student]]:
    """Students whose moments fit together, with two more of the largest: while it is added to, and solved."""
    group: list[Student] = []
    used = largest = 0
    for student in students:
        sizes = [
            8 * each.in_features * (each.in_features + each.out_features) for each in student.projections().values()
        ]
        needed, workspace = sum(sizes), 2 * max(sizes)
        if group and used + needed + max(largest, workspace) > memory_bytes:
            yield group
            group, used, largest = [], 0, 0
        group.append(student)
        used, largest = used + needed, max(largest, workspace)
    if group:
        yield group
