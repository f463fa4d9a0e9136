"""A process with gloo's threads must not come to the interpreter's end, where one that wants its lock aborts it."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import PROJECT, child_environment

BODY = """
import atexit, sys
import torch
import torch.distributed as dist
from peft_pretraining.runtime.signals import run_script

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    kept.append(dist.group.WORLD)  # as a divided model's mesh, in torch's caches
    print("finished", end="")  # not flushed by hand
    return 0

class AtTheEnd:
    def __del__(self):
        sys.stderr.write("the interpreter's end")

kept = [AtTheEnd()]
atexit.register(sys.stderr.write, "registered ")
sys.exit(run_script(main))
"""


def test_the_process_leaves_with_everything_done_but_not_through_the_interpreters_end(tmp_path):
    environment = child_environment(PYTHONPATH=str(PROJECT))
    done = subprocess.run(
        [sys.executable, "-c", BODY],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "finished", "registered ")
    assert os.listdir(tmp_path) == []
