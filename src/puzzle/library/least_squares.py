"""The least-squares update of the output projections of many students at once, on calibration text.

A projection W from its input a to the subblock's output y is linear. With everything before it as it is, the optimum is
W0 + (E[y a^T] - W0 C) (C + damping)^-1, where C = E[a a^T] and W0 is the present map. A bias stays.

Shapes: B batch, T tokens, N = B * T, D hidden size, I inputs of a projection.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from puzzle.library.students import Student
from puzzle.streams import LayerPass, packed
from puzzle.variants import damping

Text = Callable[[], Iterable[LayerPass]]
"""Every layer of every batch of the calibration text, as often as it is called."""


@torch.no_grad()
def update_projections(students: Sequence[Student], text: Text, memory_bytes: int) -> None:
    """Set the students' projections to their optimum, in as many passes as the memory for moments asks for.

    A projection whose optimum is not finite stays as it is; students without one are left alone.
    """
    updates = [_Update(student, student.projection) for student in students if student.projection is not None]
    # While one is added to and solved, it takes the room of two more.
    room = memory_bytes - max((2 * update.num_bytes for update in updates), default=0)
    for group in packed(updates, lambda update: update.num_bytes, room):
        for seen in text():
            for update in group:
                update.add(seen)
        for update in group:
            update.solve()


class _Update:
    """E[a a^T] and E[(y - b) a^T] of one projection; products in float32, sums in float64."""

    def __init__(self, student: Student, projection: nn.Linear) -> None:
        self._student, self._projection = student, projection
        self.num_bytes = 8 * projection.in_features * (projection.in_features + projection.out_features)
        self._sums: tuple[Tensor, Tensor] | None = None
        self._tokens = 0

    def add(self, seen: LayerPass) -> None:
        if seen.index != self._student.layer:
            return
        bias = self._projection.bias
        wanted_ND = seen.subblock_output(self._student.variants[0].subblock).float().flatten(0, 1)
        wanted_ND = wanted_ND if bias is None else wanted_ND - bias
        input_NI = self._student.projection_input(seen).float().flatten(0, 1)
        second_II, cross_DI = (input_NI.T @ input_NI).double(), (wanted_ND.T @ input_NI).double()
        if self._sums is not None:
            second_II, cross_DI = second_II.add_(self._sums[0]), cross_DI.add_(self._sums[1])
        self._sums = second_II, cross_DI
        self._tokens += len(input_NI)

    def solve(self) -> None:
        assert self._sums is not None, "no text"
        second_II, cross_DI = (total.div_(self._tokens) for total in self._sums)
        self._sums = None
        weight_DI = self._projection.weight.double()
        left_DI = cross_DI - weight_DI @ second_II
        second_II.diagonal().add_(damping(second_II))
        solved_DI = weight_DI + torch.linalg.solve(second_II, left_DI.T).T
        if solved_DI.isfinite().all():
            self._projection.weight.copy_(solved_DI)
