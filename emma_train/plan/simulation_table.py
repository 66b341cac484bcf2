"""A simulated rank as a table, beside the plan's arithmetic."""

from rich.console import Console
from rich.table import Table

from emma_train.engine.protocol import MakeOptimizer
from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import GIB
from emma_train.plan.exchange import exchange
from emma_train.plan.simulation import Simulation, not_simulated, simulate
from emma_train.plan.state import state_memory

KEPT = {
    "weights": ("weights, fp32 shard",),
    "optimizer state": ("Adam moments, fp32 shards", "Muon's momentum, fp32 shards"),
}
"""What a rank keeps, by the names of plan/state.py."""


def print_simulation(plan: Plan, source: str, make_optimizer: MakeOptimizer) -> None:
    """Print what a rank of `plan.num_gpus` keeps and sends, or why that is not simulated."""
    console = Console(width=100, highlight=False, soft_wrap=False)
    if problem := not_simulated(plan.recipe, plan.num_gpus):
        console.print(f"Simulation: {problem}.")
        return
    simulated = simulate(plan.recipe, source, plan.num_gpus, make_optimizer)
    table = Table(title=f"Rank 0 of {plan.num_gpus}, simulated", title_justify="left", caption_justify="left")
    for column in ("", "simulated", "by the plan", "ratio", "of a micro-step", "collectives"):
        table.add_column(column, justify="right" if column else "left")
    for name, (counted, planned) in compared(plan, simulated).items():
        ratio = f"{counted / planned:.3f}" if planned else "-"
        of_one = simulated.per_micro_step.get(name)
        calls = simulated.collectives.get(name)
        table.add_row(
            name,
            _size(counted),
            _size(planned),
            ratio,
            f"{_size(of_one[1])} in {of_one[0]}" if of_one else "",
            f"{calls[0]:,} a step" if calls else "",
        )
    table.caption = (
        f"{simulated.units} FSDP units, {simulated.micro_steps} micro-steps a step. Sizes of collectives are those of "
        "their complete tensors. Shards are padded, so that rank 0 has most. Time is not simulated."
    )
    console.print(table)


def compared(plan: Plan, simulated: Simulation) -> dict[str, tuple[float, float]]:
    """(simulated, by the plan) bytes of a step, by name."""
    kept, sent = state_memory(plan.recipe, plan.sizes, plan.num_gpus), exchange(plan)
    planned = {name: sum(kept.get(part, 0.0) for part in parts) for name, parts in KEPT.items()}
    shards = plan.num_gpus // plan.recipe.engine.replicate
    planned["gradients"] = 4 * plan.sizes.trained / shards  # after the step's last backward pass
    planned |= {"all-gather": sent.gathered, "reduce-scatter": sent.reduced, "all-reduce": sent.summed}
    counted = {
        "weights": simulated.weights,
        "gradients": simulated.gradients,
        "optimizer state": simulated.optimizer,
        **{name: size for name, (_, size) in simulated.collectives.items()},
    }
    names = [name for name in planned if counted.get(name) or planned[name]]
    return {name: (counted.get(name, 0.0), planned[name]) for name in names}


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:,.2f} MiB"
