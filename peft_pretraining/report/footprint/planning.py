"""What a run needs: memory, traffic, launches, time, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peft_pretraining.config import Config
from peft_pretraining.methods import METHODS
from peft_pretraining.report.footprint.drive import Measured, Simulation
from peft_pretraining.report.footprint.roofline import Time, times
from peft_pretraining.runtime.devices import GIB, Device

CONTEXT = 0.6
"""GiB that a process takes of a device beside what PyTorch allocates: CUDA's context and kernels."""
COMMUNICATION = 0.4
"""GiB for the buffers of nccl."""
FRAGMENTS = 0.02
"""Share of the device's memory that the allocator cannot use."""
COMPONENTS = (
    *("weights", "gathered weights", "gradients", "bases", "states", "activations", "logits", "workspace"),
    "libraries",
)
_SAMPLED = 4
"""Updates that are looked at for one with a refresh, where refreshes are staggered."""


@dataclass
class Update:
    """One kind of update."""

    name: str
    step: int
    peak: int
    """Bytes, with those of the libraries."""
    at: str
    components: dict[str, int]
    launches: dict[str, int]
    waits: dict[str, int]
    exchanged: dict[str, int]
    """Bytes by collective."""
    times: dict[str, Time]

    @property
    def seconds(self) -> float:
        return sum(each.total for each in self.times.values())


@dataclass
class Plan:
    device: Device
    devices: int
    micro_batch: int
    accumulation: int
    tokens_per_update: int
    updates: int
    kinds: list[Update]
    capacity: int
    """Bytes for PyTorch's tensors on one device."""
    largest_micro_batch: int | None
    dividing_micro_batch: int | None
    """The largest that fits and divides the total batch."""
    seconds_per_update: float

    @property
    def peak(self) -> int:
        return max(each.peak for each in self.kinds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_update / self.seconds_per_update

    @property
    def hours(self) -> float:
        return self.seconds_per_update * self.updates / 3600

    def as_json(self) -> dict[str, Any]:
        """Bytes and seconds, by name."""
        kinds = []
        for each in self.kinds:
            spent = {
                phase: {**asdict(time), "total": time.total, "bound_by": time.bound_by}
                for phase, time in each.times.items()
            }
            kinds.append({**asdict(each), "times": spent, "seconds": each.seconds})
        derived = ("peak", "tokens_per_second", "hours")
        return {
            **{name: value for name, value in vars(self).items() if name not in ("kinds", "device")},
            **{name: getattr(self, name) for name in derived},
            "device": asdict(self.device),
            "fits": self.peak <= self.capacity,
            "kinds": kinds,
        }


def capacity(device: Device, devices: int) -> int:
    """Bytes of a device that tensors can have."""
    taken = CONTEXT + (COMMUNICATION if devices > 1 else 0.0)
    return int((device.memory * (1 - FRAGMENTS) - taken) * GIB)


def make_plan(config: Config, shape: dict[str, Any], device: Device, devices: int, search: bool = True) -> Plan:
    """Simulates the first, an ordinary and a refreshing update, an evaluation and a save. `search`: look for the
    largest micro-batch, too."""
    with Simulation(config, shape, devices) as simulation:
        first = simulation.update(0)
        ordinary, refresh = _later_updates(simulation)
        measured = {"first": (0, first), "ordinary": ordinary}
        if refresh is not None:
            measured["refresh"] = refresh
        beside = {"evaluation": simulation.evaluation(), "saving": simulation.saving()}
        accumulation = simulation.accumulation
        kinds = [_described(name, step, each, device, config) for name, (step, each) in measured.items()]
        kinds += [_described(name, -1, each, device, config) for name, each in beside.items()]
        room = capacity(device, devices)
        largest = _largest(simulation, kinds, room) if search else None
    batch = config.batch
    total = batch.total_batch_size or (batch.batch_size or 1) * accumulation * devices
    return Plan(
        device=device,
        devices=devices,
        micro_batch=batch.batch_size or 1,
        accumulation=accumulation,
        tokens_per_update=total * simulation.length,
        updates=config.schedule.num_training_steps + config.schedule.num_extra_training_steps,
        kinds=kinds,
        capacity=room,
        largest_micro_batch=largest,
        dividing_micro_batch=None if largest is None else _dividing(largest, total // devices),
        seconds_per_update=_mean_seconds(config, kinds),
    )


def _later_updates(simulation: Simulation) -> tuple[tuple[int, Measured], tuple[int, Measured] | None]:
    """An ordinary update and one with a refresh, or None where nothing is ever refreshed: that with more launches."""
    gap = _period(simulation.config)
    found = {1: simulation.update(1)}
    if gap and _staggered(simulation.config):
        for step in range(2, 1 + _SAMPLED):
            found[step] = simulation.update(step)
            if len({sum(each.counts.launches().values()) for each in found.values()}) > 1:
                break
    elif gap and gap > 1:
        found[gap] = simulation.update(gap)
    order = sorted(found, key=lambda step: sum(found[step].counts.launches().values()))
    least, most = order[0], order[-1]
    same = found[least].counts.launches() == found[most].counts.launches()
    return (least, found[least]), None if same else (most, found[most])


def _period(config: Config) -> int | None:
    """Updates between two in which a method does more than usual."""
    name = METHODS[config.method.method].period
    value = getattr(config.method, name, None) if name else None
    return int(value) if value else None


def _staggered(config: Config) -> bool:
    return bool(getattr(config.method, "stagger_refresh", False))


def _described(name: str, step: int, measured: Measured, device: Device, config: Config) -> Update:
    libraries = 2 * device.products_workspace * 2**20
    counts = measured.counts
    return Update(
        name=name,
        step=step,
        peak=measured.peak + libraries,
        at=f"{measured.phase}, {measured.operator}",
        components={**measured.components, "libraries": libraries},
        launches=counts.launches(),
        waits=counts.host_waits(),
        exchanged=counts.exchanged(),
        times=times(counts, device, getattr(config, "precision", None) and config.precision.matmul_precision),
    )


def _mean_seconds(config: Config, kinds: list[Update]) -> float:
    """Over many updates."""
    by_name = {each.name: each.seconds for each in kinds}
    ordinary = by_name["ordinary"]
    refresh = by_name.get("refresh", ordinary)
    if _staggered(config):
        return (ordinary + refresh) / 2
    return ordinary + (refresh - ordinary) / (_period(config) or 1)


def _largest(simulation: Simulation, kinds: list[Update], room: int) -> int:
    """The largest micro-batch whose updates fit: memory is nearly linear in it, so a few sizes tell. 0: none."""
    given, step = simulation.batch_size, next(each.step for each in kinds if each.name == "ordinary")
    known = {given: max(each.peak for each in kinds)}
    beyond = known[given] - next(each.peak for each in kinds if each.name == "ordinary")
    libraries = kinds[0].components["libraries"]

    def peak(size: int) -> int:
        if size not in known:
            simulation.batch_size = size
            known[size] = simulation.update(step).peak + libraries + beyond
        return known[size]

    peak(2 * given if known[given] < room else max(1, given // 2))
    for _ in range(3):
        sizes = sorted(known, key=lambda size: abs(known[size] - room))[:2]
        if len(sizes) < 2:
            break
        slope = (known[sizes[0]] - known[sizes[1]]) / (sizes[0] - sizes[1])
        guess = max(1, int(sizes[0] + (room - known[sizes[0]]) / max(slope, 1.0)))
        if guess in known:
            break
        peak(guess)
    simulation.batch_size = given
    return max((size for size, its in known.items() if its <= room), default=0)


def _dividing(largest: int, share: int) -> int | None:
    """The largest micro-batch up to `largest` that divides this device's share of the total batch."""
    return max((size for size in range(1, min(largest, share) + 1) if share % size == 0), default=None)
