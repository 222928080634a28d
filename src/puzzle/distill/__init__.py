"""Global knowledge distillation."""

from puzzle.distill.gkd import distil as distil
from puzzle.distill.gkd import distillation_curve as distillation_curve
