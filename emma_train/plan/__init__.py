"""What a recipe asks of a machine, without one: `print_plan` for people, `Plan` for programs."""

from emma_train.plan.arithmetic import Plan
from emma_train.plan.tables import print_plan

__all__ = ["Plan", "print_plan"]
