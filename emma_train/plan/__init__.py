"""What a recipe asks of a machine, without one: `print_plan` for people, `Plan` for programs."""

from emma_train.plan.advice import problems
from emma_train.plan.arithmetic import Plan
from emma_train.plan.tables import Machine, print_plan, print_total

__all__ = ["Machine", "Plan", "print_plan", "print_total", "problems"]
