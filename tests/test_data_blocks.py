"""The order of training samples, and reading them."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import BLOCK, write_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pretraining import rng
from peft_pretraining.data.block_writer import BlockWriter, token_dtype, write_dataset_dict
from peft_pretraining.data.blocks import (
    MicroBatchSampler,
    SampleOrder,
    TokenBlocks,
    evaluation_batches,
    training_batches,
    useful_workers,
)
from peft_pretraining.distributed import ProcessGroup


def group(rank=0, world_size=1):
    return ProcessGroup(rank, world_size, rank, world_size, torch.device("cpu"))


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, seed):
    assert np.array_equal(np.sort(rng.permute(np.arange(size), size, seed)), np.arange(size))


def test_permute_of_a_few_positions_equals_that_of_all():
    everything = rng.permute(np.arange(1000), 1000, 7)
    some = np.array([[3, 999], [0, 512]])
    assert np.array_equal(rng.permute(some, 1000, 7), everything[some])


def test_permute_looks_random():
    """Over many seeds each element goes everywhere equally often, and neighbours do not stay together."""
    size, draws = 8, 4000
    results = np.stack([rng.permute(np.arange(size), size, seed) for seed in range(draws)])
    for position in range(size):
        counts = np.bincount(results[:, position], minlength=size)
        chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum()
        assert chi_square < 35  # 7 degrees of freedom: 1e-5 of all uniform draws are beyond
    neighbours = (np.abs(np.diff(results, axis=1)) == 1).mean()
    assert abs(neighbours - 2 / size) < 0.02
    big = rng.permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(big, np.arange(100_000))[0, 1]) < 0.01


def test_generators_are_pure_functions_of_their_arguments():
    def draw(*arguments):
        return torch.rand(4, generator=rng.generator(*arguments))

    assert torch.equal(draw(1, "basis", 3, 4), draw(1, "basis", 3, 4))
    others = [(2, "basis", 3, 4), (1, "switch", 3, 4), (1, "basis", 4, 4), (1, "basis", 3, 5), (1, "basis", 34, 0)]
    assert not any(torch.equal(draw(1, "basis", 3, 4), draw(*other)) for other in others)


def test_each_epoch_has_every_sample_once_in_its_own_order():
    order = SampleOrder(size=50, seed=3)
    stream = order.samples(np.arange(150)).reshape(3, 50)
    assert all(np.array_equal(np.sort(epoch), np.arange(50)) for epoch in stream)
    assert len({tuple(epoch) for epoch in stream}) == 3
    assert not np.array_equal(stream[0], SampleOrder(50, seed=4).samples(np.arange(50)))


def updates(world_size, batch_size, accumulation, start, count):
    """The set of samples of each update, over all ranks."""
    ranks = [
        iter(MicroBatchSampler(SampleOrder(50, 3), start, batch_size, accumulation, group(rank, world_size)))
        for rank in range(world_size)
    ]
    return [
        sorted(sample for rank in ranks for _ in range(accumulation) for sample in next(rank)) for _ in range(count)
    ]


def test_updates_hold_the_same_samples_at_any_world_size_and_from_any_start():
    expected = updates(1, 8, 1, 0, 20)  # 160 samples: three epochs and a bit
    for world_size, batch_size, accumulation in ((1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1), (8, 1, 1)):
        assert updates(world_size, batch_size, accumulation, 0, 20) == expected
        assert updates(world_size, batch_size, accumulation, 7 * 8, 13) == expected[7:]


def test_blocks_are_cut_and_read_as_they_were_written(data_dir):
    whole, halves = TokenBlocks(data_dir, "train", BLOCK), TokenBlocks(data_dir, "train", BLOCK // 2)
    assert (len(whole), len(halves)) == (200, 400)
    batch = halves.__getitems__([6, 7, 0])["input_ids"]
    assert batch.dtype == torch.int64
    assert torch.equal(batch[:2].flatten(), whole[3])
    assert torch.equal(batch[2], whole[0][: BLOCK // 2])
    assert whole.largest_token_id(10**9) == 127
    assert torch.equal(pickle.loads(pickle.dumps(halves))[399], halves[399])


def test_many_shards_are_one_sequence(tmp_path, data_dir):
    from datasets import load_from_disk

    data = load_from_disk(str(data_dir))
    data.save_to_disk(str(tmp_path / "sharded"), num_shards={"train": 7, "validation": 1})
    (tmp_path / "sharded" / "args.json").write_text((data_dir / "args.json").read_text())
    one, many = TokenBlocks(data_dir, "train", BLOCK), TokenBlocks(tmp_path / "sharded", "train", BLOCK)
    indices = [199, 0, 28, 29, 30, 57, 58]
    assert torch.equal(one.__getitems__(indices)["input_ids"], many.__getitems__(indices)["input_ids"])


def test_a_wrong_block_length_in_the_description_is_noticed(tmp_path):
    folder = write_blocks(tmp_path / "data", train=8, validation=2)
    (folder / "args.json").write_text(json.dumps({"sequence_length": BLOCK // 2}))
    with pytest.raises(ValueError, match="not all of 32 tokens"):
        TokenBlocks(folder, "train", BLOCK // 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_processes_change_nothing(data_dir, workers):
    blocks = TokenBlocks(data_dir, "train", BLOCK)
    batches = training_batches(
        blocks, seed=5, start=195, batch_size=4, accumulation=2, workers=workers, group=group()
    )  # over the end of the first epoch
    order = SampleOrder(200, 5).samples(np.arange(195, 195 + 12)).reshape(3, 4)
    for expected in order:
        assert torch.equal(next(batches)["input_ids"], blocks.__getitems__(expected.tolist())["input_ids"])


def test_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert useful_workers(8, group()) == 8
    assert useful_workers(8, group(world_size=4)) == 3
    assert useful_workers(8, group(world_size=16)) == 1
    assert useful_workers(0, group()) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_the_same_first_samples_at_any_world_size(data_dir, world_size):
    blocks = TokenBlocks(data_dir, "validation", BLOCK)
    per_rank = [
        list(evaluation_batches(blocks, max_samples=11, batch_size=2, group=group(rank, world_size)))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    read = [batch["input_ids"] for batches in zip(*per_rank, strict=True) for batch in batches if batch is not None]
    assert torch.equal(torch.cat(read), blocks.__getitems__(list(range(11)))["input_ids"])


def written(folder, dtype, ids):
    folder.mkdir()
    for split in ("train", "validation"):
        writer = BlockWriter(folder / split, 8, dtype)
        writer.add(ids, 1)
        writer.finish()
    write_dataset_dict(folder, ["train", "validation"])
    (folder / "args.json").write_text(json.dumps({"sequence_length": 8}))
    return TokenBlocks(folder, "train", 8), sum(path.stat().st_size for path in folder.rglob("*.arrow"))


def test_two_bytes_hold_the_same_tokens(tmp_path):
    ids = np.array([0, 65535, *range(40_000, 60_000)][: 8 * 2500], dtype=np.int32)
    narrow, size = written(tmp_path / "narrow", token_dtype(65535), ids)
    wide, twice = written(tmp_path / "wide", token_dtype(65536), ids)
    samples = [blocks.__getitems__(list(range(2500)))["input_ids"] for blocks in (narrow, wide)]
    assert torch.equal(*samples) and samples[0].dtype == torch.int64 and samples[0].max() == 65535
    assert size < 0.55 * twice and narrow.largest_token_id(10**9) == 65535


def test_an_id_that_does_not_fit_is_no_other_one(tmp_path):
    with pytest.raises(ValueError, match="token id 65536 does not fit into uint16"):
        BlockWriter(tmp_path / "train", 8, token_dtype(65535)).add(np.array([1, 65536], dtype=np.int32), 1)
