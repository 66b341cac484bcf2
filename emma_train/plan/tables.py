"""A plan as text: a few tables, 100 columns wide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from emma_train.config.schema import Recipe
from emma_train.plan.advice import problems, ways_to_speed
from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import CARDS, GIB, RESERVE, usable_bytes
from emma_train.plan.checkpoint_size import WRITE_BYTES_S, checkpoint_size
from emma_train.plan.data_volume import data_volume
from emma_train.plan.roofline import estimated_mfu, parts_of_step, step_seconds
from emma_train.plan.samples import ASSUMED_BYTES_PER_PIXEL, ReadIndexRows, tokenwise
from emma_train.plan.traffic import Network, traffic
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.tasks import TASKS


@dataclass(frozen=True)
class Machine:
    """Where a recipe is to run."""

    num_gpus: int = 8
    gpu_name: str = "h100-80g"
    mfu: float | None = None
    network: Network = Network()


def print_plan(
    recipe: Recipe, recipe_path: str, machine: Machine, read_index_rows: ReadIndexRows | None = None
) -> tuple[Plan, int]:
    """Print the plan. Returns it, and 0, or 1 if the recipe cannot run there. Raises UserError as `Plan` does."""
    plan = Plan(recipe, recipe_path, machine.num_gpus, machine.gpu_name, machine.mfu, read_index_rows)
    where = f"{plan.num_gpus} x {plan.gpu_name}"
    console = Console(width=100, highlight=False, soft_wrap=False)
    console.print(f"[bold]{recipe_path}[/bold]: {plan.stage.name}, {plan.stage.title}, on {where}\n")
    console.print(_parameter_table(plan))
    for line in plan.optimizer_lines:
        console.print(line)
    console.print(_token_table(plan))
    for note in image_notes(plan):
        console.print(note)
    vae, least, most = tokenwise(1024)
    emma = (1024 // recipe.model.autoencoder.pixels) ** 2
    console.print(
        f"A 1024² reference image in editing: {emma:,} tokens, token-wise {vae + least:,} to {vae + most:,} "
        f"(1/{(vae + least) / emma:.1f} to 1/{(vae + most) / emma:.1f})\n"
    )
    console.print(_step_table(plan))
    console.print(data_line(plan, machine.network))
    console.print(_memory_table(plan))
    console.print(_storage_table(plan, machine.network))
    lines = problems(plan)
    for problem in lines:
        console.print(f"[red]Cannot run:[/red] {problem}.")
    if not lines:
        console.print(f"[green]Fits[/green] on {where}.")
        for line in _network_lines(plan, machine.network):
            console.print(line)
    return plan, int(bool(lines))


def data_line(plan: Plan, network: Network) -> str:
    """What the stage reads from its shards, in all and an hour and node."""
    volume, nodes = data_volume(plan), max(1.0, plan.num_gpus / network.gpus_per_node)
    sizes = "from the index" if volume.measured else f"in part assumed, {ASSUMED_BYTES_PER_PIXEL:g} bytes a pixel"
    latents = f", and {_decimal(volume.latents)} of latents where they are cached" if volume.latents else ""
    return (
        f"Data: {_decimal(volume.read)} read from shards ({sizes}){latents}; an estimated "
        f"{_decimal(volume.per_hour(nodes))} of shards an hour for each node of {network.gpus_per_node}."
    )


def print_total(plans: Sequence[Plan]) -> None:
    """Steps, samples, tokens, time and storage of a pipeline's stages together."""
    lengths = [(plan, load, n) for plan in plans for load, n in zip(plan.loads, plan.phase_steps, strict=True)]
    seconds = sum(n * step_seconds(plan, load) for plan, load, n in lengths)
    gpu_hours = sum(n * step_seconds(plan, load) * plan.num_gpus for plan, load, n in lengths) / 3600
    console = Console(width=100, highlight=False, soft_wrap=False)
    console.print(
        f"[bold]All {len(plans)} stages[/bold]: {sum(n for _, _, n in lengths):,} steps, "
        f"{_short_count(sum(n * sum(load.samples.values()) for _, load, n in lengths))} samples, "
        f"{_short_count(sum(n * load.tokens for _, load, n in lengths))} tokens, an estimated {_seconds(seconds)} and "
        f"{gpu_hours:,.1f} GPU-hours, {_gib(sum(checkpoint_size(plan).total for plan in plans))} of checkpoints, "
        f"{_decimal(sum(data_volume(plan).read for plan in plans))} read from shards"
    )


def _storage_table(plan: Plan, network: Network) -> Table:
    """Checkpoints, and the host memory for one that is written while training goes on."""
    storage, train = checkpoint_size(plan), plan.recipe.train
    table = _titled_table("Checkpoints", "", "")
    table.add_row("one", _gib(storage.checkpoint))
    if storage.frozen:
        table.add_row("what never changes, once", _gib(storage.frozen))
    table.add_row(f"all, with train.keep={train.keep}", _gib(storage.total))
    share = storage.checkpoint * min(network.gpus_per_node, plan.num_gpus) / plan.num_gpus
    if train.save_async:
        table.add_row(f"host memory of a node with {network.gpus_per_node} GPUs, for one", _gib(share))
    table.add_row(f"time to write one at {WRITE_BYTES_S / 1e9:g} GB/s", _seconds(storage.write_s))
    if storage.write_s > train.stop_within_s:
        table.caption = (
            f"longer than train.stop_within_s={train.stop_within_s}: a run that is asked to stop would end unsaved"
        )
    return table


def _network_lines(plan: Plan, network: Network) -> list[str]:
    """What the exchange of weights and gradients takes beside computing, and what would shorten it."""
    if plan.num_gpus == 1:
        return []
    now = traffic(plan, network)
    how = f"an estimated {_seconds(now.communication_s)} of communication and {_seconds(now.computing_s)} of computing"
    where = f"{network.gbits:g} Gb/s for each GPU between nodes of {network.gpus_per_node}"
    ways = " and ".join(ways_to_speed(plan, network))
    if now.hidden:
        shorter = f" Planned alone, each of these makes steps shorter: {ways}." if ways else ""
        return [f"Network: {how} a step at {where}: the times above assume that computing hides it.{shorter}"]
    return [
        f"[yellow]Network:[/yellow] {how} a step at {where}: a step takes at least {_seconds(now.step_s)}. "
        f"What would shorten it: {ways or 'a faster network or longer packs'}."
    ]


def _parameter_table(plan: Plan) -> Table:
    table = _titled_table("Parameters: stored, trained, and active for one token", "")
    for column in ("stored", "trained", "text", "understood", "reference", "target"):
        table.add_column(column, justify="right")
    rows = [(p.name, [p.stored, p.trained, *p.active]) for p in plan.parts]
    for name, counts in rows:
        table.add_row(name, *(_short_count(n) for n in counts))
    table.add_section()
    totals = [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)]
    table.add_row("model", *(_short_count(n) for n in totals), style="bold")
    table.add_row("autoencoder, never trained", _short_count(plan.autoencoder), *[""] * 5)
    if not plan.has_autoencoder:
        table.caption = f"{plan.recipe.model.autoencoder.path} is not here: counts of dc-ae-f32c32-sana-1.0"
    return table


def _token_table(plan: Plan) -> Table:
    """One row per kind of sample. "Token-wise" models have VAE and ViT tokens; understanding has ViT tokens only."""
    columns = ("task, images", "text", "seen", "target", "EMMA", "token-wise at 16x", "ratio", "from")
    table = _titled_table("Tokens of a mean sample", *columns)
    pixels = plan.recipe.model.autoencoder.pixels
    for task, mean in dict.fromkeys(pair for load in plan.loads for pair in load.means.items()):
        image = TASKS[task].image_config(plan.recipe.data)
        vae, low, high = tokenwise(pixels * math.sqrt(mean.seen / max(mean.images_seen, 1.0)))
        made, _, _ = tokenwise(pixels * math.sqrt(mean.made))
        encoded = vae * (TASKS[task].condition is ImageRole.REFERENCE)
        least, most = (mean.text + mean.images_seen * (encoded + vit) + made for vit in (low, high))
        size = "native" if image.mode == "native" else f"{image.side}² {image.mode}".removesuffix(" square")
        table.add_row(
            f"{task}, {size}",
            *(f"{n:,.0f}" if n else "-" for n in (mean.text, mean.seen, mean.made)),
            f"{mean.tokens:,.0f}",
            f"{least:,.0f}" if most == least else f"{least:,.0f} to {most:,.0f}",
            f"1/{least / mean.tokens:.1f}",
            "index" if mean.measured else "assumption",
        )
    return table


def image_notes(plan: Plan) -> list[str]:
    """A line for each task of which samples are not used, or have images that are enlarged."""
    notes = []
    for task, mean in dict.fromkeys(pair for load in plan.loads for pair in load.means.items()):
        section, image = TASKS[task].images, TASKS[task].image_config(plan.recipe.data)
        if mean.unsuitable:
            limits = f"data.{section}.min_side={image.min_side}" + (
                f", max_aspect={image.max_aspect:g}" if image.mode == "buckets" else ""
            )
            notes.append(f"{task}: {mean.unsuitable:.1%} of the samples are not used ({limits})")
        if mean.enlarged:
            notes.append(
                f"{task}: {mean.enlarged:.1%} of the samples have an image that is enlarged to more than twice its "
                f"pixels; data.{section}.min_side leaves small ones out"
            )
    return notes


def _step_table(plan: Plan) -> Table:
    slots, loads, lengths = plan.recipe.data.slots, plan.loads, plan.phase_steps
    table = _titled_table("Steps (FLOPs of one step on all GPUs)", "", *(load.phase.name for load in loads))
    work, seconds = [plan.flops(load) for load in loads], [step_seconds(plan, load) for load in loads]
    parts = [{} if plan.mfu else parts_of_step(plan, load) for load in loads]
    shared = slots * plan.recipe.engine.sequence_parallel
    packs = f"{shared / plan.num_gpus:g}" + " (not whole)" * (shared % plan.num_gpus > 0)
    rows: dict[str, list[str]] = {
        "samples a step": ["\n".join(f"{n:,} {task}" for task, n in x.samples.items()) for x in loads],
        "tokens a step": [_short_count(x.tokens) for x in loads],
        "packs a step (slots)": [str(slots)] * len(loads),
        "packs of each GPU": [packs] * len(loads),
        f"tokens a pack (cap {plan.recipe.data.pack_tokens:,})": [f"{x.tokens / slots:,.0f}" for x in loads],
        **{f"FLOPs, {name}": [_flops(w[name]) for w in work] for name in work[0]},
        "FLOPs, model": [_flops(sum(w.values())) for w in work],
        "FLOPs, computed again in backward": [_flops(plan.repeated_flops(x)) for x in loads],
        "FLOPs, autoencoder": [_flops(plan.encoding_flops(x)) for x in loads],
        **(
            {"FLOPs, Newton-Schulz": [_flops(sum(plan.newton_schulz_loads()))] * len(loads)} if plan.muon_shapes else {}
        ),
        **{f"estimated: {part}": [_seconds(p[part]) for p in parts] for part in parts[0]},
        "estimated: step": [_seconds(s) for s in seconds],
        "estimated: MFU, of the bf16 peak": [f"{estimated_mfu(plan, x):.0%}" for x in loads],
        "steps": [f"{n:,}" for n in lengths],
        "samples": [_short_count(n * sum(x.samples.values())) for n, x in zip(lengths, loads, strict=True)],
        "tokens": [_short_count(n * x.tokens) for n, x in zip(lengths, loads, strict=True)],
        "estimated: time": [_seconds(n * s) for n, s in zip(lengths, seconds, strict=True)],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    total = sum(n * s for n, s in zip(lengths, seconds, strict=True))
    hours = f"{total * plan.num_gpus / 3600:,.1f} GPU-hours"
    how = f"at {plan.mfu:.0%} MFU" if plan.mfu else "by the model of plan/roofline.py"
    table.caption = (
        f"The stage, estimated {how}: {_seconds(total)}, {hours} (no checkpoints, sample images or failures)"
        + "; as in bf16, for no card has measured engine.fp8 yet" * (plan.recipe.engine.fp8 != "off")
    )
    return table


def _memory_table(plan: Plan) -> Table:
    slots, cap = plan.recipe.data.slots, plan.recipe.data.pack_tokens
    worst = max(plan.loads, key=lambda load: plan.memory(load, plan.num_gpus, cap).peak)
    mean, full = (plan.memory(worst, plan.num_gpus, tokens) for tokens in (worst.tokens / slots, cap))
    title = "Memory of a GPU" + f" in phase {worst.phase.name}" * (len(plan.loads) > 1)
    table = _titled_table(title, "", f"mean pack, {worst.tokens / slots:,.0f} tokens", f"full pack, {cap:,} tokens")
    for name in full.kept:
        if full.kept[name]:
            table.add_row(name, _gib(mean.kept[name]), _gib(full.kept[name]))
    table.add_row("autoencoder at work (before activations)", _gib(mean.encoding), _gib(full.encoding))
    if full.exchange:
        table.add_row("Muon's matrices on their way (after backward)", _gib(mean.exchange), _gib(full.exchange))
    table.add_section()
    table.add_row("peak", _gib(mean.peak), _gib(full.peak), style="bold")
    room = _gib(usable_bytes(plan.gpu_name))
    table.add_row(f"{plan.gpu_name}: {CARDS[plan.gpu_name][0]:.1f} GiB less {RESERVE:.0%} reserve", room, room)
    return table


def _titled_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _short_count(n: float) -> str:
    if n >= 1e9:
        return f"{n / 1e9:,.3f} B"
    if n >= 1e6:
        return f"{n / 1e6:,.1f} M"
    return f"{n:,.0f}" if n else "-"


def _flops(n: float) -> str:
    if not n:
        return "-"
    unit, size = next((u for u in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)) if n >= u[1]), ("GFLOP", 1e9))
    return f"{n / size:,.1f} {unit}"


def _decimal(num_bytes: float) -> str:
    """In powers of ten, as storage and networks count."""
    unit, size = next((u for u in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)) if num_bytes >= u[1]), ("MB", 1e6))
    return f"{num_bytes / size:,.1f} {unit}"


def _gib(n: float) -> str:
    return f"{n / GIB:,.2f} GiB" if n >= 0.1 * GIB or not n else f"{n / 2**20:,.2f} MiB"


def _seconds(s: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if s >= size:
            return f"{s / size:,.1f} {unit}"
    return f"{s * 1e3:,.1f} ms"
