"""Starting a training run: torchrun on this machine, or a job of a SLURM cluster. Both start the documented command."""

from launchers.command import LaunchOptions, add_launch_arguments, torchrun_command
from launchers.slurm import launch, slurm_script

__all__ = ["LaunchOptions", "add_launch_arguments", "launch", "slurm_script", "torchrun_command"]
