"""Begin collectives by the hundred on one gloo group, in many processes, and count how these ended.

    python tests/gloo_threads.py --processes 20 --seconds 20

Half of the processes have torch's two threads for the group, half the one thread of distributed/gloo.py. It needs no
other rank: what two threads do to the heap, they do after a collective. Prints a table, and the end of the log of every
process with one thread that did not exit with 0; exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import helpers

_AT_ONCE = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=20, help="how many in all, one after the other")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each of them goes on")
    parser.add_argument("--child", choices=["one", "two"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        hammer(options.child == "one", options.seconds)
    ends: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for number in range(options.processes):
        threads = ("two", "one")[number % 2]
        command = [sys.executable, __file__, "--child", threads, "--seconds", str(options.seconds)]
        environment = helpers.child_environment(PYTHONPATH=str(helpers.PROJECT))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        ends[threads][done.returncode] += 1
        if done.returncode and threads == "one":
            print(helpers.last_words(done.stderr), flush=True)
    print("| threads | processes | exit codes |\n|---|--:|---|")
    for threads, codes in sorted(ends.items()):
        shown = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
        print(f"| {threads} | {codes.total()} | {shown} |")
    return int(any(ends["one"].keys() - {0}))


def hammer(one_thread: bool, seconds: float) -> None:
    """One collective after the other, of the kind whose name needs memory; ends the process with exit code 0."""
    import torch
    import torch.distributed as dist

    from peft_pretraining.distributed.gloo import one_thread_per_group

    with one_thread_per_group() if one_thread else contextlib.nullcontext():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole, part, end = torch.empty(8), torch.ones(8), time.monotonic() + seconds
    while time.monotonic() < end:
        begun = [dist.group.WORLD.allgather_into_tensor_coalesced([whole], [part]) for _ in range(_AT_ONCE)]
        for work in begun:
            work.wait()
    os._exit(0)  # as runtime/leaving.py does


if __name__ == "__main__":
    sys.exit(main())
