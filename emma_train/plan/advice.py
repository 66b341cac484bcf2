"""What would make a recipe fit or run faster: only changes whose own plan says so."""

from collections.abc import Iterator

from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import CARDS, GIB, WITHOUT_FP8, usable_bytes
from emma_train.plan.roofline import step_seconds
from emma_train.plan.traffic import Network, traffic

MOST_WAYS = 4
AGAIN = ("selective", "full")
"""Modes of engine.activation_checkpointing, the one that costs less time first."""
WORTH = 0.98
"""A change is named where steps take at most this share of their time."""


def problems(plan: Plan) -> list[str]:
    """Why the recipe cannot run on these GPUs, and what would; empty if it can."""
    lines, cap = plan.sharing_problems(), plan.recipe.data.pack_tokens
    if plan.recipe.engine.fp8 != "off" and plan.gpu_name in WITHOUT_FP8:
        lines.append(f"engine.fp8 is {plan.recipe.engine.fp8}, and a {plan.gpu_name} lacks its 8-bit products; set off")
    needed, available = plan.peak(plan.num_gpus, cap), usable_bytes(plan.gpu_name)
    if needed > available:
        ways = ", or ".join(ways_to_fit(plan)) or "only more GPUs, larger ones and shorter packs together"
        lines.append(
            f"a full pack needs {needed / GIB:.1f} GiB, a {plan.gpu_name} has {available / GIB:.1f}; "
            f"what would fit: {ways}"
        )
    return lines


def ways_to_fit(plan: Plan) -> list[str]:
    """Changes of a plan that does not fit, each alone enough; the cheapest first."""
    ways = [text for text, changed in _changes(plan) if changed.fits()][:MOST_WAYS]
    return ways or [text for text, _ in _both(plan)]


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes to try, those that cost least first; of a series that is ordered by cost, the first that fits."""
    engine, cap = plan.recipe.engine, plan.recipe.data.pack_tokens
    if not engine.compile and engine.sequence_parallel == 1:
        yield "engine.compile=true", plan.with_changes({"compile": True})
    if not engine.reshard_after_forward:
        yield "engine.reshard_after_forward=true", plan.with_changes({"reshard_after_forward": True})
    yield from _first(
        (f"engine.replicate={copies}", plan.with_changes({"replicate": copies}))
        for copies in range(engine.replicate - 1, 0, -1)
        if engine.replicate % copies == 0
    )
    modes = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[engine.activation_checkpointing]
    recomputed = [
        (f"engine.activation_checkpointing={mode}", plan.with_changes({"activation_checkpointing": mode}))
        for mode in modes
    ]
    yield from _first((f"{text}{_costs(plan, changed)}", changed) for text, changed in recomputed)
    counts = [n for n in plan.gpu_counts() if n > plan.num_gpus]
    yield from _first((f"{n} GPUs", plan.with_changes(num_gpus=n)) for n in counts)
    yield from _first(
        (f"data.pack_tokens={n}", plan.with_changes(pack_tokens=n))
        for n in (cap * part // 16 for part in range(15, 0, -1))
    )
    larger = sorted((usable_bytes(name), name) for name in CARDS if usable_bytes(name) > usable_bytes(plan.gpu_name))
    yield from _first((f"{plan.num_gpus} x {name}", plan.with_changes(gpu_name=name)) for _, name in larger)


def _both(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """More GPUs that also compute all layers again, where neither alone is enough."""
    full = plan.with_changes({"activation_checkpointing": "full"})
    yield from _first(
        (f"{n} GPUs with engine.activation_checkpointing=full", full.with_changes(num_gpus=n))
        for n in plan.gpu_counts()
        if n > plan.num_gpus
    )


def _first(changes: Iterator[tuple[str, Plan]]) -> Iterator[tuple[str, Plan]]:
    yield from (
        (text, changed) for text, changed in [next(((t, c) for t, c in changes if c.fits()), ("", None))] if changed
    )


def _costs(plan: Plan, changed: Plan) -> str:
    seconds = [sum(step_seconds(p, load) for load in p.loads) for p in (plan, changed)]
    return f" (steps take {seconds[1] / seconds[0] - 1:+.0%})"


def ways_to_speed(plan: Plan, network: Network) -> list[str]:
    """Changes that fit and make steps shorter: compiled layers, weights that stay gathered and longer packs, and, where
    communication takes longer than computing, replicas and fewer sums of gradients."""
    if not plan.fits():
        return []
    now, ways = traffic(plan, network), []
    for text, changed in _faster(plan, network, now.hidden):
        if changed.fits() and traffic(changed, network).step_s < WORTH * now.step_s:
            ways.append(text)
    return ways


def _faster(plan: Plan, network: Network, hidden: bool) -> Iterator[tuple[str, Plan]]:
    """Changes to try, of those that differ in memory alone the first that fits."""
    engine, data, nodes = plan.recipe.engine, plan.recipe.data, max(1, plan.num_gpus // network.gpus_per_node)
    if not hidden and engine.kind == "fsdp" and engine.replicate != nodes:
        modes = [{"replicate": nodes, **mode} for mode in ({}, *({"activation_checkpointing": m} for m in AGAIN))]
        changes = ((" ".join(f"engine.{k}={v}" for k, v in mode.items()), plan.with_changes(mode)) for mode in modes)
        yield from _first(changes)
    if not hidden and engine.reduce_every_micro_step and engine.kind == "fsdp":
        yield "engine.reduce_every_micro_step=false", plan.with_changes({"reduce_every_micro_step": False})
    if not engine.compile and engine.sequence_parallel == 1:
        yield "engine.compile=true", plan.with_changes({"compile": True})
    if engine.kind == "fsdp" and engine.reshard_after_forward:
        yield "engine.reshard_after_forward=false", plan.with_changes({"reshard_after_forward": False})
    if data.samples_per_step and data.slots % 2 == 0:
        half, tokens = data.slots // 2, 2 * data.pack_tokens
        yield f"data.slots={half} data.pack_tokens={tokens}", plan.with_changes(slots=half, pack_tokens=tokens)
