"""Starting a training run: torchrun on this machine, or a job of a SLURM cluster. Both start the documented command."""

from launchers.launch import launch
from launchers.options import LaunchOptions, add_launch_arguments
from launchers.slurm import ARRAY, Job, first_of_array

__all__ = ["ARRAY", "Job", "LaunchOptions", "add_launch_arguments", "first_of_array", "launch"]
