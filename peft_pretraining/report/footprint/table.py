"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from peft_pretraining.report.footprint import roofline
from peft_pretraining.report.footprint.counters import PHASES
from peft_pretraining.report.footprint.planning import COMPONENTS, CONTEXT, FRAGMENTS, Plan, Update
from peft_pretraining.runtime.devices import GIB


def describe(plan: Plan) -> str:
    """The whole plan."""
    device = plan.device
    updates = [each for each in plan.kinds if each.step >= 0]
    parts = [
        f"{plan.devices} x {device.name} ({device.memory:g} GiB), micro-batches of {plan.micro_batch} sequences, "
        f"{plan.accumulation} of them per update and device, {plan.tokens_per_update:,} tokens per update",
        "Memory of one device, GiB\n" + _memory(plan.kinds),
        _fit(plan),
        "Launches and host waits per update\n" + _table(["", *PHASES, "sum"], _counts(updates)),
        *([] if plan.devices == 1 else ["Bytes per update and device, MB\n" + _exchanged(updates)]),
        "Time per update, ms\n" + _table(["", *PHASES, "sum"], _times(updates)),
        _speed(plan),
        assumptions(plan),
    ]
    return "\n\n".join(parts)


def _memory(kinds: Sequence[Update]) -> str:
    present = [name for name in COMPONENTS if any(each.components.get(name, 0) >= 2**20 for each in kinds)]
    rows = [[name, *(_gib(each.components.get(name, 0)) for each in kinds)] for name in present]
    rows.append(["peak", *(_gib(each.peak) for each in kinds)])
    rows.append(["which is in", *(each.at for each in kinds)])
    return _table(["", *(each.name for each in kinds)], rows)


def _fit(plan: Plan) -> str:
    fits = "fits" if plan.peak <= plan.capacity else "DOES NOT FIT"
    said = f"Peak {_gib(plan.peak)} GiB of {_gib(plan.capacity)}: {fits}."
    if plan.largest_micro_batch is None:
        return said
    if plan.largest_micro_batch == 0:
        return f"{said} Not even micro-batches of one sequence were found to fit."
    dividing = plan.dividing_micro_batch
    more = "" if dividing is None else f"; that divides the total batch: {dividing}"
    return f"{said} Largest micro-batch that fits: {plan.largest_micro_batch} sequences{more}."


def _counts(updates: Sequence[Update]) -> list[list[str]]:
    rows = []
    for each in updates:
        for what, counted in (("launches", each.launches), ("waits", each.waits)):
            numbers = [counted[phase] for phase in PHASES]
            rows.append([f"{each.name}: {what}", *(f"{number:,}" for number in (*numbers, sum(numbers)))])
    return rows


def _exchanged(updates: Sequence[Update]) -> str:
    names = sorted({name for each in updates for name in each.exchanged})
    rows = []
    for each in updates:
        sizes = [*(each.exchanged.get(name, 0) for name in names), sum(each.exchanged.values())]
        rows.append([each.name, *(f"{size / 1e6:,.1f}" for size in sizes)])
    return _table(["", *(name.replace("_", "-") for name in names), "sum"], rows)


def _times(updates: Sequence[Update]) -> list[list[str]]:
    return [
        [
            each.name,
            *(f"{each.times[phase].total * 1e3:.1f} ({each.times[phase].bound_by})" for phase in PHASES),
            f"{each.seconds * 1e3:.1f}",
        ]
        for each in updates
    ]


def _speed(plan: Plan) -> str:
    return (
        f"On average {plan.seconds_per_update * 1e3:,.0f} ms an update, {plan.tokens_per_second:,.0f} tokens/s; "
        f"{plan.updates:,} updates take {plan.hours:,.1f} hours, evaluation, saving and waiting for data left out."
    )


def assumptions(plan: Plan) -> str:
    """What the numbers rest on."""
    return (
        "Memory is simulated from the run's own code, allocation by allocation; of it, "
        f"{CONTEXT:g} GiB for CUDA's context and {FRAGMENTS:.0%} for fragments are set aside, and workspaces of "
        "decompositions (cuSOLVER) are not known. Launches are dispatched operators, 6 to 17% more than kernels. "
        f"Time is an estimate: products at {roofline.EFFICIENCY:.0%} of the data sheet's rate (a quarter of it where "
        f"rows are no multiples of 16 bytes), other kernels at {roofline.BANDWIDTH:.0%} of the memory's, collectives "
        f"at {roofline.LINK:.0%} of the links', {roofline.LAUNCH * 1e6:.0f} us of the host per operator and "
        f"{roofline.WAIT * 1e6:.0f} per wait; the slowest of the three counts in each phase. Nothing is compiled."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In columns, the first to the left and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )
