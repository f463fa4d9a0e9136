"""Which document stands at which position, and going on from any position without reading what lies before."""

from __future__ import annotations

import gzip
import json

import pytest
from streaming_helpers import TRAIN, Ranks, named, open_shards, write_lines, write_shards

from peft_pretraining.data import shards as shards_module
from peft_pretraining.data.shards import DataError, Shard
from peft_pretraining.data.streaming import Cursor, DocumentStream, in_order_of_files, read_windows

SIZE = sum(TRAIN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "c4")


@pytest.fixture(scope="module")
def train(folder):
    return open_shards(folder).train


@pytest.fixture
def no_waiting(monkeypatch):
    """Reading is tried again, five times, at once."""
    waits = []
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", (0, 0, 0, 0, 0))
    monkeypatch.setattr(shards_module.time, "sleep", waits.append)
    return waits


def epoch(shards, number=0, seed=3, window=16):
    return named(DocumentStream(shards, seed, size=window).take(number * SIZE, SIZE)[:])


def everything(shards):
    return {(shard, line) for shard, count in enumerate(TRAIN) for line in range(count)}


def test_each_epoch_has_every_document_once_in_an_order_of_its_own(train):
    orders = [epoch(train, number) for number in range(3)]
    assert all(set(order) == everything(train) and len(order) == SIZE for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch(train) == orders[0] and epoch(train, seed=4) != orders[0]


def test_the_order_of_shards_is_shuffled_too(train):
    def order_of_shards(number):
        windows = read_windows(train, 3, 10**6, Cursor(epoch=number))
        return list(dict.fromkeys(document.shard for document in next(windows).documents))

    orders = {tuple(order_of_shards(number)) for number in range(8)}
    assert len(orders) > 4 and all(sorted(order) == list(range(len(TRAIN))) for order in orders)


def test_documents_are_shuffled_within_windows_that_cross_shards(train):
    windows = read_windows(train, 3, 16, Cursor())
    stream = DocumentStream(train, 3, size=16)
    moved = 0
    for number in range(-(-SIZE // 16)):
        window = next(windows)
        assert len(window.documents) == min(16, SIZE - 16 * number)  # the epoch's last holds what is left
        taken = stream.take(window.start.position, len(window.documents))
        assert sorted(taken) == sorted(window.documents)
        moved += taken != window.documents
    assert moved >= 7
    assert (window.end.epoch, window.end.position) == (1, SIZE)


@pytest.mark.parametrize("window", [1, 7, 16, SIZE, 5000])
def test_updates_hold_the_same_documents_at_any_world_size(train, window):
    def updates(world_size, batch_size, accumulation):
        ranks = Ranks(train, world_size, batch_size, window=window)
        return [(ranks.update(accumulation), ranks.state) for _ in range(50)]  # three epochs and a half

    expected = updates(1, 8, 1)
    for world_size, batch_size, accumulation in ((1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1), (8, 1, 1)):
        assert updates(world_size, batch_size, accumulation) == expected


def test_a_changed_world_size_loses_and_repeats_no_document(train):
    ranks, seen, positions = Ranks(train, 1, 1), [], []
    while ranks.position < 2 * SIZE:
        for world_size in (1, 2, 4, 1):
            ranks = Ranks(train, world_size, 4 // world_size, ranks.position, json.loads(json.dumps(ranks.state)))
            positions.append(ranks.position)
            seen += ranks.update() + ranks.update()
    assert any(0 < position % 16 for position in positions)  # in the middle of windows
    for number in range(2):
        counted = seen[number * SIZE : (number + 1) * SIZE]
        assert len(counted) == len(set(counted)) == SIZE and set(counted) == everything(train)
    assert seen == named(DocumentStream(train, 3, size=16).take(0, len(seen)))


@pytest.mark.parametrize("extension", [".json.gz", ".jsonl", ".json", ".jsonl.gz"])
def test_every_position_can_be_gone_on_from(tmp_path, train, extension):
    other = open_shards(write_shards(tmp_path / "c4", extension)).train
    whole = Ranks(train, 1, 3)
    for _ in range(2 * SIZE // 3):
        expected = whole.update()
        for state in (whole.state, {}):  # without a state the place is counted from the first shard on
            if state:
                state = DocumentStream(other, 3, size=16).state_at(0) | {k: v for k, v in state.items() if k != "order"}
            going_on = Ranks(other, 1, 3, whole.position, state)
            after = Ranks(train, 1, 3, whole.position - 3, {})
            assert after.update() == expected
            assert going_on.update() == Ranks(train, 1, 3, whole.position, whole.state).update()


def test_the_state_of_a_run_that_went_on_is_that_of_one_that_did_not(train):
    whole = Ranks(train, 1, 8)
    for _ in range(9):
        whole.update()
    other = Ranks(train, 2, 4, whole.position, whole.state)
    for _ in range(20):
        assert (whole.update(), whole.state) == (other.update(), other.state)


def test_going_on_reads_nothing_of_the_past(tmp_path, no_waiting):
    """Shards that are done are gone, and of the present one everything before the window is overwritten."""
    folder = write_shards(tmp_path / "c4", ".json", train=(40,) * 6)
    train = open_shards(folder).train
    whole = Ranks(train, 1, 5)
    while not (whole.state and whole.state["shard"] == 2 and whole.state["line"] > 10):
        whole.update()
    going_on = [Ranks(train, 1, 5, whole.position, whole.state) for _ in range(2)]
    expected = [going_on[0].update() for _ in range(6)]
    order = list(dict.fromkeys(document.shard for document in next(read_windows(train, 3, 999, Cursor())).documents))
    for done in order[:2]:
        train[done].path().unlink()
    data = train[order[2]].path().read_bytes()
    train[order[2]].path().write_bytes(b"\0" * whole.state["offset"] + data[whole.state["offset"] :])
    assert [going_on[1].update() for _ in range(6)] == expected


def test_of_a_gz_shard_no_line_of_the_past_is_read(train, monkeypatch):
    windows = read_windows(train, 3, 16, Cursor())
    window = next(window for window in windows if window.start.line > 10 and window.start.shard > 0)
    read, lines = [], Shard.lines

    def recorded(shard, offset=0, number=0):
        for line in lines(shard, offset, number):
            read.append((shard.name, line.number))
            yield line

    monkeypatch.setattr(Shard, "lines", recorded)
    assert next(read_windows(train, 3, 16, window.start)).documents == window.documents
    assert len(read) <= 17 and read[0][1] == window.start.line


def test_a_state_of_other_shards_or_another_seed_is_not_used(train, folder, tmp_path):
    whole = Ranks(train, 1, 8)
    for _ in range(9):
        whole.update()
    for shards, seed in ((train, 4), (open_shards(write_shards(tmp_path / "c4", train=(50, 50, 14))).train, 3)):
        stream = DocumentStream(shards, seed, whole.position, whole.state, 16)
        expected = DocumentStream(shards, seed, size=16).take(0, whole.position + 40)[whole.position :]
        assert stream.take(whole.position, 40) == expected


def test_blank_lines_are_no_documents(tmp_path):
    lines = ["", *(json.dumps({"text": str(i)}) for i in range(5)), "  ", json.dumps({"text": "last"}), ""]
    for split in ("train", "validation"):
        write_lines(tmp_path / f"c4-{split}.json", lines)
    shards = open_shards(tmp_path)
    assert [document.line for document in in_order_of_files(shards.validation)] == [1, 2, 3, 4, 5, 7]
    stream = DocumentStream(shards.train, 0, size=4)
    assert sorted(document.line for document in stream.take(0, 6)) == [1, 2, 3, 4, 5, 7]
    assert (stream.epoch_at(5), stream.epoch_at(6)) == (0, 1)


def test_a_shard_that_comes_back_is_read_on_where_it_broke_off(train, no_waiting, monkeypatch):
    expected, opened, failures = epoch(train), Shard.open, [0]

    class Breaking:
        """Every third read fails, as on a network disk that comes and goes."""

        def __init__(self, file):
            self.file, self.reads = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __iter__(self):
            for line in self.file:
                self.reads += 1
                if self.reads == 3:
                    failures[0] += 1
                    raise OSError(5, "Input/output error")
                yield line

    monkeypatch.setattr(Shard, "open", lambda shard, offset: Breaking(opened(shard, offset)))
    assert epoch(train) == expected
    assert failures[0] > 40 and len(no_waiting) >= failures[0]


def test_a_shard_that_stays_away_ends_in_one_line(tmp_path, no_waiting):
    folder = write_shards(tmp_path / "c4")
    train = open_shards(folder).train
    stream = DocumentStream(train, 3, size=16)
    first = stream.take(0, 10)
    for shard in train:
        shard.path().unlink()
    with pytest.raises(DataError, match=r"c4-train.*cannot be read, after 5 more attempts .*No such file"):
        stream.take(10, SIZE)
    assert len(first) == 10 and len(no_waiting) >= 5


def test_a_shard_that_changed_under_the_run(tmp_path):
    folder = write_shards(tmp_path / "c4")
    train = open_shards(folder).train
    write_lines(folder / train[0].name, ["{}"])
    with pytest.raises(DataError, match=r"c4-train.00000.* has \d+ bytes, but had \d+ when the run was launched"):
        epoch(train)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_gz_shard_is_named_at_once(tmp_path, damage, no_waiting):
    folder = write_shards(tmp_path / "c4")
    path = folder / "c4-train.00002-of-00005.json.gz"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-6] ^= 1  # of the checksum
    else:
        data = bytearray(b"text")
    path.write_bytes(data)
    problems = []
    with pytest.raises(DataError, match=r"c4-train.00002-of-00005.json.gz: damaged or cut short near line \d+"):
        epoch(shards_module.find_local_shards(str(folder), "--base_dir", problems, []).train)
    assert not problems and not no_waiting


def test_a_gz_shard_of_several_members(tmp_path, train):
    """As `cat a.gz b.gz` and parallel compressors write them."""
    folder = write_shards(tmp_path / "c4")
    path = folder / train[0].name
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(gzip.compress(b"".join(lines[i : i + 10])) for i in range(0, len(lines), 10)))
    assert epoch(open_shards(folder).train) == epoch(train)


def test_the_past_of_a_gz_shard_is_shorter_than_it_was(tmp_path):
    folder = write_shards(tmp_path / "c4")
    shard = open_shards(folder).train[0]
    with pytest.raises(DataError, match="ends before byte 1000000"):
        next(shard.lines(10**6, 5))
