"""Where GaLore stops short of the minimum, and GoLore does not (arXiv 2410.11289, section 4).

    python experiments/non_convergence.py                 # all methods, both inner optimizers, about 3 minutes
    python experiments/non_convergence.py --seeds 42,1,2  # the table of docs/non_convergence.md
    python experiments/non_convergence.py --type 2 --optimizer SGD --rand_ratio 0.25 --lr 3e-5 --epoch 200000

Minimises a quadratic function with noisy gradients. Into --output_dir it writes f(X) - f* over the steps, as a CSV file
for each run, summary.csv, summary.md, plot.png and settings.json. Exit code 2 for bad input: one line per problem on
stderr.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any folder, without installation

import non_convergence_config
from non_convergence_config import Run, Settings

from peft_pretraining.flags import ConfigError, exit_with_problems
from peft_pretraining.runtime.workers import obey_the_parent

if TYPE_CHECKING:
    from descent import Trajectory


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings, warnings = non_convergence_config.load(sys.argv[1:] if argv is None else argv, description=__doc__)
    except ConfigError as error:
        return exit_with_problems(error)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    import non_convergence_report as report  # after the checks: it is slow to load

    report.start(settings)
    finished = {}
    for trajectory in follow_all(settings):
        run, last = trajectory.run, trajectory.samples[-1]
        report.write_run(settings.folder, trajectory)
        finished[run] = trajectory
        gap = f"f(X) - f* = {last.gap:.4f} after {last.step:,} steps"
        print(f"{run.optimizer:<6} {run.method:<11} seed {run.seed}: {gap} ({trajectory.seconds:.0f} s)", flush=True)
    trajectories = [finished[run] for run in settings.runs()]
    print(f"\n{report.write_summary(settings.folder, trajectories)}\nplot: {settings.folder / 'plot.png'}")
    return 0


def follow_all(settings: Settings) -> Iterator[Trajectory]:
    """Every run, as it finishes, `settings.jobs` of them at a time."""
    # Not forked: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    runs = settings.runs()
    pool = ProcessPoolExecutor(min(settings.jobs, len(runs)), context, initializer=obey_the_parent)
    try:
        for future in as_completed([pool.submit(_follow, run) for run in runs]):
            yield future.result()
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(run: Run) -> Trajectory:
    import torch
    from descent import descend

    torch.set_num_threads(1)  # for matrices this small more threads would only wait for each other
    return descend(run)


if __name__ == "__main__":
    sys.exit(main())
