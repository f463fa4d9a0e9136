"""Under torchrun: runs of the methods with factors, what each rank holds after each, and what it handed to collectives.

    torchrun --nproc-per-node 2 factor_ranks.py CASES.json

CASES.json is a list of command lines. Beside it, `rank{N}.json` gets a list of {"exit_code", "digest", "bytes",
"trainable"}, one per command: the SHA-256 of weights, pools and optimizer state, the bytes reduced in each update, and
the number of trained parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import helpers
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.training import build, build_model


def digest(run) -> str:
    found = hashlib.sha256()
    state = [run.optimizer.state[param] for param in run.model.parameters() if param.requires_grad]
    for tensor in (*run.model.state_dict().values(), *(value for each in state for value in each.values())):
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def main(path: Path) -> None:
    rank, results, sent = int(os.environ["RANK"]), [], []
    train, parallelize, all_reduce = build.train, build_model.parallelize, dist.all_reduce

    def counted_all_reduce(tensor, *args, **settings):
        if tensor.is_floating_point() and tensor.numel() > 8:  # not the trainer's few scalars
            sent[-1] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **settings)

    def counted_parallelize(model, group, low_rank, *settings):
        assert low_rank is None
        wrapped = parallelize(model, group, low_rank, *settings)
        assert isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
        wrapped.register_comm_hook(None, allreduce_hook)  # through `dist.all_reduce`, where bytes are counted
        return wrapped

    def observed_train(run):
        before_update = run.method.before_update

        def counted_before_update(model, optimizer, step):
            sent.append(0)
            before_update(model, optimizer, step)

        run.method.before_update = counted_before_update
        code = train(run)
        trainable = sum(param.numel() for param in run.model.parameters() if param.requires_grad)
        results[-1] |= {"digest": digest(run), "bytes": list(sent), "trainable": trainable}
        sent.clear()
        return code

    build.train, build_model.parallelize, dist.all_reduce = observed_train, counted_parallelize, counted_all_reduce
    # One group for all runs: a second one would find the first one's addresses in torchrun's store.
    init, destroy = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *args, **settings: None if dist.is_initialized() else init(*args, **settings)
    dist.destroy_process_group = lambda: None
    for argv in json.loads(path.read_text()):
        results.append({})
        results[-1]["exit_code"] = helpers.run(argv)
    destroy()
    (path.parent / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
