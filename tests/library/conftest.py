"""Text that ends a process in the middle of its work."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from puzzle.data import TokenData


class Killed(BaseException):
    """Stands for a kill."""


class CutData(TokenData):
    left: int

    def sequences(self, *where: Any) -> Tensor:
        object.__setattr__(self, "left", self.left - 1)
        if self.left < 0:
            raise Killed
        return super().sequences(*where)


@pytest.fixture
def cut_after(pico_data: TokenData) -> Callable[[int], TokenData]:
    """The pico text, which kills whoever asks for more than so many batches."""

    def cut(batches: int) -> TokenData:
        data = CutData(pico_data.path, pico_data.address, pico_data.sequence_length, pico_data.counts)
        object.__setattr__(data, "left", batches)
        return data

    return cut
