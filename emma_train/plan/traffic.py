"""How long the exchange of weights and gradients takes, by a stated model: bytes over the slowest link of a ring.

FSDP gathers every weight in compute precision for forward, and units that backward passes through again for it (the
root and the last decoder layer stay gathered), in every micro-step; or every weight once a step
(engine.reshard_after_forward=false). Gradients are reduced in fp32, in every micro-step or the last
(engine.reduce_every_micro_step). With replicas (HSDP) this stays within one, and gradients are summed over the replicas
once a step. ZeRO-1 and 2 reduce gradients in every micro-step and gather weights once a step; ZeRO-3 is as FSDP. A ring
of n ranks sends (n - 1) / n of the bytes over each link.
What is computed meanwhile hides it, so a step takes the longer of the two: the best case.
"""

from dataclasses import dataclass

from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import node_bandwidth
from emma_train.plan.exchange import exchange, micro_steps_of
from emma_train.plan.roofline import step_seconds

GPUS_PER_NODE = 8
GBITS_PER_GPU = 400.0
"""One 400 Gb/s card for each GPU."""
USABLE = 0.8
"""Share of a network's peak that collectives reach."""


@dataclass(frozen=True)
class Network:
    """gbits: Gb/s of each GPU to other nodes, so 50 where eight GPUs share one card of 400 Gb/s."""

    gbits: float = GBITS_PER_GPU
    gpus_per_node: int = GPUS_PER_NODE

    @property
    def card(self) -> float:
        """Bytes a second of one GPU to another node."""
        return self.gbits * 1e9 / 8 * USABLE

    def bandwidth(self, gpu_name: str, ranks: int) -> float:
        """Bytes a second of a ring of so many neighbouring ranks. NCCL makes as many rings as a node has cards, each of
        which leaves the node by another card."""
        within = node_bandwidth(gpu_name)
        return within if ranks <= self.gpus_per_node else min(within, self.gpus_per_node * self.card)


@dataclass(frozen=True)
class Traffic:
    """Seconds of one step on each GPU."""

    communication_s: float
    computing_s: float

    @property
    def hidden(self) -> bool:
        """Whether computing can hide it."""
        return self.communication_s <= self.computing_s

    @property
    def step_s(self) -> float:
        return max(self.communication_s, self.computing_s)


def traffic(plan: Plan, network: Network) -> Traffic:
    """Of the phase that takes longest."""
    engine, sizes, world = plan.recipe.engine, plan.sizes, plan.num_gpus
    weight = 2 if engine.precision == "bf16" else 4
    micro_steps = micro_steps_of(plan)

    def seconds(num_bytes: float, ranks: int, speed: float | None = None) -> float:
        speed = speed or network.bandwidth(plan.gpu_name, ranks)
        return num_bytes * (ranks - 1) / ranks / speed if ranks > 1 else 0.0

    if engine.kind == "fsdp":
        sent = exchange(plan)
        # The copies of a shard are sent between nodes, each by its GPU's own card, unless all are on one.
        between = network.card if world > network.gpus_per_node else node_bandwidth(plan.gpu_name)
        total = seconds(sent.gathered + sent.reduced, world // engine.replicate)
        total += seconds(2 * sent.summed, engine.replicate, between)
    elif engine.zero_stage == 3:
        used = sizes.stored - sizes.unused
        total = seconds(micro_steps * (2 * weight * used + weight * sizes.trained), world)
    else:
        total = seconds(micro_steps * weight * sizes.trained + weight * sizes.trained, world)
    return Traffic(total, max(step_seconds(plan, load) for load in plan.loads))
