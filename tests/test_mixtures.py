"""Mixtures of data folders: shares, order, resuming, validation."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
from launching import launch
from test_evaluation_sets import LENGTH, command, data, folder

from peft_pretraining.data.blocks import MixedBlocks, SampleOrder, TokenBlocks
from peft_pretraining.data.folder import bytes_per_token, read_arguments
from peft_pretraining.data.mixed_order import MixedOrder
from peft_pretraining.data.mixture import PERIOD, counts_of, sources_of

assert folder, "a fixture"


@pytest.fixture
def order():
    orders = [SampleOrder(500, 3), SampleOrder(90, 4)]
    return MixedOrder(orders, [500, 90], [0.7, 0.3], seed=1), orders


def test_each_period_has_its_share_and_each_source_its_own_order(order):
    mixed, orders = order
    samples = mixed.samples(np.arange(2 * PERIOD))
    for period in samples.reshape(2, PERIOD):
        assert np.bincount(period >= 500).tolist() == [7000, 3000]
    assert not np.array_equal(*(samples.reshape(2, PERIOD) >= 500))
    first, second = samples[samples < 500], samples[samples >= 500] - 500
    assert np.array_equal(first, orders[0].samples(np.arange(14000)))  # 28 epochs
    assert np.array_equal(second, orders[1].samples(np.arange(6000)))
    assert abs((samples[:1000] >= 500).mean() - 0.3) < 0.06  # and it is mixed within a period


def test_a_sample_depends_on_its_position_alone(order):
    mixed, _ = order
    everything = mixed.samples(np.arange(25_000))
    some = np.array([0, 9_999, 10_000, 24_999, 5])
    assert np.array_equal(mixed.samples(some), everything[some])
    assert mixed.read_before(12_345) == [
        int((everything[:12_345] < 500).sum()),
        int((everything[:12_345] >= 500).sum()),
    ]


@pytest.mark.parametrize("shares", [[1 / 3] * 3, [0.9999, 0.0001], [0.123456, 0.876544], [1.0]])
def test_counts_add_up(shares):
    counts = np.array(counts_of(shares))
    assert counts.sum() == PERIOD and (np.abs(counts - np.array(shares) * PERIOD) <= 1).all() and counts.min() > 0


def test_what_a_path_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [source.share for source in sources_of("a:2, b:6")] == [0.25, 0.75]
    assert [source.name for source in sources_of("x/a:1,y/a:1,b:1")] == ["a_1", "a_2", "b"]
    assert sources_of("a,b")[0].folder == "a,b"
    (tmp_path / "a:1,b:1").mkdir()
    assert sources_of("a:1,b:1")[0].folder == "a:1,b:1"


def mixture(folder, *weights):
    return ",".join(f"{data(folder, name)}:{weight}" for name, weight in zip(("wiki", "news"), weights, strict=True))


def test_blocks_stand_one_after_the_other(folder):
    parts = [TokenBlocks(data(folder, name), "train", LENGTH) for name in ("wiki", "news")]
    mixed, first = MixedBlocks(parts), len(parts[0])
    rows = mixed.__getitems__([0, first, first - 1, len(mixed) - 1])["input_ids"]
    expected = [parts[0][0], parts[1][0], parts[0][first - 1], parts[1][len(parts[1]) - 1]]
    assert [row.tolist() for row in rows] == [row.tolist() for row in expected]
    assert mixed.place(first) == f"{data(folder, 'news')}: split train, row 0"


def test_a_run_goes_on_exactly_and_says_what_it_has_read(folder, tmp_path, capsys):
    def argv(name):
        return command(folder, tmp_path / name, "--dataset_path", mixture(folder, 3, 1), "--eval_parts", 2)

    assert helpers.run(argv("whole")) == 0
    assert "75.00% wiki_bpe_32" in capsys.readouterr().err
    helpers.stop_after(2, argv("stopped"))
    assert helpers.run([*argv("stopped"), *helpers.RESUME]) == 0
    helpers.assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    last = [record for record in helpers.records(tmp_path / "whole") if "final_eval_loss" in record][-1]
    sets = last["eval_sets"]
    assert list(sets) == ["wiki_bpe_32", "news_bpe_32"]
    losses = [each["loss"] for each in sets.values()]
    assert last["final_eval_loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    per_token = [bytes_per_token(read_arguments(data(folder, name)), "validation") for name in ("wiki", "news")]
    mean = 0.75 * per_token[0] + 0.25 * per_token[1]
    assert last["final_eval_bits_per_byte"] == pytest.approx(last["final_eval_loss"] / np.log(2) / mean)
    assert sum(last["source_tokens"].values()) == 4 * 4 * LENGTH == last["tokens_seen"]
    assert last["final_eval_perplexity_1"] > 1


def test_other_weights_are_other_data(folder, tmp_path, capsys):
    for weights, code in (((1, 1), 0), ((2, 2), 0), ((2, 1), 2)):
        argv = command(folder, tmp_path / "run", "--dataset_path", mixture(folder, *weights))
        assert helpers.run([*argv, *helpers.RESUME]) == code
    assert "it was begun with other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("{wiki}:0,{news}:1", "must be a positive number, not '0'"),
        ("{wiki}:x,{news}:1", "must be a positive number, not 'x'"),
        ("{wiki}:nan,{news}:1", "must be a positive number"),
        ("{wiki}:1,{news}:1e9", "is below 1 in 10,000 samples"),
        ("{wiki}:1,nowhere:1", "--dataset_path nowhere: no such folder"),
        ("{wiki}:1,{other}:1", "with vocab_size 290"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(folder, tmp_path, capsys, path, problem):
    other = tmp_path / "other"
    other.mkdir()
    for file in data(folder, "news").iterdir():
        (other / file.name).symlink_to(file)
    (other / "args.json").unlink()
    (other / "args.json").write_text(json.dumps({**read_arguments(data(folder, "news")), "vocab_size": 290}))
    path = path.format(wiki=data(folder, "wiki"), news=data(folder, "news"), other=other)
    assert helpers.run(command(folder, tmp_path / "run", "--dataset_path", path)) == 2
    err = capsys.readouterr().err
    assert problem in err and "Traceback" not in err, err


def test_a_further_set_cannot_have_a_sources_name(folder, tmp_path, capsys):
    sets = ["--eval_datasets", f"{data(folder, 'wiki').name}={data(folder, 'main')}"]
    assert helpers.run(command(folder, tmp_path / "run", "--dataset_path", mixture(folder, 1, 1), *sets)) == 2
    assert "a source of --dataset_path has this name" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_read_what_one_does(folder, tmp_path):
    flags = ["--dataset_path", mixture(folder, 3, 1), "--dtype", "float64", "--total_batch_size", 4]
    assert helpers.run([*command(folder, tmp_path / "one"), *flags]) == 0
    argv = [*command(folder, tmp_path / "two"), *flags, "--batch_size", 2]
    launch(tmp_path / "launch", 2, [{"argv": list(map(str, argv))}])
    one, two = (helpers.updates(tmp_path / name) for name in ("one", "two"))
    assert np.allclose(one, two, atol=1e-9, rtol=0)
