"""Text that ends a process in the middle of its work."""

from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor

from puzzle.data import TokenData


class Killed(BaseException):
    """Stands for a kill."""


@dataclass(frozen=True)
class CutData(TokenData):
    """A text that kills whoever asks for more than so many batches."""

    left: list[int]

    @classmethod
    def of(cls, data: TokenData, batches: int) -> Self:
        return cls(*(getattr(data, field.name) for field in fields(data)), left=[batches])

    def sequences(self, *where: Any) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Killed
        return super().sequences(*where)
