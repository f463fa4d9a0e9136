"""Reading a checkpoint's tensors: whatever its description says, nothing is run, and what is wrong is one line."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path

import helpers  # noqa: F401  (puts the project's folder on the path)
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from peft_pretraining.checkpoint.safe_loading import load_tensors
from peft_pretraining.checkpoint.tensor_description import read_description

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors() -> dict:
    torch.manual_seed(0)
    return {
        "model": {"weight": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "channels": torch.randn(2, 3, 4, 4)},
        "optimizer": {"weight.step": torch.tensor(7), "weight.codes": torch.arange(6, dtype=torch.uint8)},
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    dcp.save(tensors(), checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def empty() -> dict:
    return {
        part: {name: torch.zeros_like(value) for name, value in entries.items()} for part, entries in tensors().items()
    }


def description(folder: Path):
    return dcp.FileSystemReader(folder).read_metadata()


def write(folder: Path, content) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_the_description_is_the_one_that_torch_reads(folder):
    expected, found = description(folder), read_description((folder / ".metadata").read_bytes())
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert {key.index for key in found.storage_data} == {key.index for key in expected.storage_data}
    assert found.version == expected.version


def test_tensors_come_back_bit_by_bit(folder):
    loaded = empty()
    load_tensors(loaded, folder)
    for part, entries in tensors().items():
        for name, value in entries.items():
            assert torch.equal(loaded[part][name], value), name


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_descriptions_of_other_protocols(folder, protocol):
    content = description(folder)
    found = read_description(pickle.dumps(content, protocol))
    assert found.state_dict_metadata == content.state_dict_metadata and found.storage_data == content.storage_data


def test_an_enumeration_by_name_as_some_versions_of_python_pickle_it(folder):
    """Their `Enum.__reduce_ex__` gives `getattr`, which is then no attribute of anything real."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    class ByName(pickle.Pickler):
        def reducer_override(self, value):
            return (getattr, (type(value), value.name)) if isinstance(value, _MEM_FORMAT_ENCODING) else NotImplemented

    file, content = io.BytesIO(), description(folder)
    ByName(file).dump(content)
    assert b"getattr" in file.getvalue()
    assert read_description(file.getvalue()).state_dict_metadata == content.state_dict_metadata


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path: Path) -> Calls:
    return Calls(os.system, f"touch '{path}'")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["top", "name", "planner", "storage"])
def test_a_call_anywhere_in_the_description_is_refused_by_name(folder, tmp_path, place, protocol):
    content, payload = description(folder), touch(tmp_path / "EXECUTED")
    if place == "top":
        content = payload
    elif place == "name":
        content.state_dict_metadata[payload] = None
    elif place == "planner":
        content.planner_data = {"x": [payload]}
    else:
        content.storage_data = {"x": payload}
    (folder / ".metadata").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=r"\.metadata: it refers to posix\.system, which is no part"):
        load_tensors(empty(), folder)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (Calls(getattr, torch.Tensor, "backward"), "it refers to torch"),
        (Calls(torch.Size, ["x"]), "a size is 'x'"),
        (Calls(eval, "1"), "it refers to builtins.eval"),
        (Calls(torch.load, "x"), "it refers to torch"),
        (b"\x80\x04\x8c\x05torch\x8c\x0bfloat32.abs\x93.", "it refers to torch.float32.abs"),
        (b"\x82\x01.", "the extension 1"),
        (b"(ctorch\nSize\no.", "an opcode of old pickles"),
        (b"(itorch\nSize\n.", "an opcode of old pickles"),
        (b"ctorch\nSize\n}S'__defaults__'\nNsb.", "it changes a function"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "a description is missing"),  # a memo of two thousand million entries
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "it is damaged"),  # a longer bytearray than there can be
        (b"", "it is damaged"),
        (b"Pid\n.", "it is damaged"),
        (b"(" * 100_000, "it is damaged"),
        ({}, "a description is missing"),
    ],
)
def test_what_is_no_description_is_refused(content, reason):
    pickled = content if isinstance(content, bytes) else pickle.dumps(content)
    with pytest.raises(ValueError, match=reason):
        read_description(pickled)


def test_every_cut_of_a_description_is_refused(folder):
    content = (folder / ".metadata").read_bytes()
    for end in range(0, len(content), max(1, len(content) // 40)):
        with pytest.raises(ValueError):
            read_description(content[:end])


def moved(folder: Path, **changes) -> None:
    """Let the description say something else of where each tensor lies."""
    content = description(folder)
    for index, place in content.storage_data.items():
        fields = {"relative_path": place.relative_path, "offset": place.offset, "length": place.length, **changes}
        content.storage_data[index] = _StorageInfo(**fields)
    write(folder, content)


@pytest.mark.parametrize("path", ["../__0_0.distcp", "/etc/passwd", "..", "", "a/__0_0.distcp", "__0_0.distcp\n", 3])
def test_data_files_lie_in_the_checkpoint(folder, path):
    (folder.parent / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    moved(folder, relative_path=path)
    with pytest.raises(ValueError, match=r"no data file of the checkpoint|is no text"):
        load_tensors(empty(), folder)


def test_objects_besides_tensors_are_refused(folder, tmp_path):
    """torch unpickles these without `weights_only`."""
    dcp.save({**tensors(), "extra": touch(tmp_path / "EXECUTED")}, checkpoint_id=folder.parent / "extra", no_dist=True)
    with pytest.raises(ValueError, match="extra is a pickled object: only tensors are read"):
        load_tensors(empty(), folder.parent / "extra")
    content = description(folder)
    content.state_dict_metadata["model.weight"] = BytesStorageMetadata()
    write(folder, content)
    with pytest.raises(ValueError, match=r"model\.weight is a pickled object"):
        load_tensors(empty(), folder)
    assert not (tmp_path / "EXECUTED").exists()


def test_a_payload_in_a_data_file_is_not_run(folder, tmp_path):
    payload = pickle.dumps(touch(tmp_path / "EXECUTED"))
    (folder / "__0_0.distcp").write_bytes(payload)
    moved(folder, offset=0, length=len(payload))
    with pytest.raises(ValueError, match="Weights only load failed"):
        load_tensors(empty(), folder)
    assert not (tmp_path / "EXECUTED").exists()


def test_ways_of_writing_that_are_not_ours_are_refused(folder):
    moved(folder, transform_descriptors=["zstd"])
    with pytest.raises(ValueError, match="written in another way"):
        load_tensors(empty(), folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_pipes_are_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"it is not a regular file: .*{name}"):
        load_tensors(empty(), folder)


def changed(folder: Path, change: str) -> None:
    content = copy.deepcopy(description(folder))
    entry = content.state_dict_metadata["model.weight"]
    if change == "missing":
        del content.state_dict_metadata["model.weight"]
    elif change == "shape":
        entry.size = torch.Size([4, 3])
    elif change == "negative":
        entry.chunks[0].sizes = (-3, 4)
    elif change == "dtype":
        entry.properties.dtype = "float32"
    elif change == "place":
        content.storage_data = {
            index: place for index, place in content.storage_data.items() if index.fqn != "model.weight"
        }
    elif change == "index":
        content.storage_data[MetadataIndex("model.weight", None, "0")] = "here"
    write(folder, content)


@pytest.mark.parametrize("change", ["missing", "shape", "negative", "dtype", "place", "index"])
def test_what_does_not_fit_is_one_line(folder, change):
    changed(folder, change)
    with pytest.raises(ValueError) as refused:
        load_tensors(empty(), folder)
    assert "\n" not in str(refused.value) and ("model.weight" in str(refused.value) or change == "negative"), (
        refused.value
    )


def test_torch_says_nothing_with_a_stack(folder, capfd):
    (folder / ".metadata").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="it is damaged"):
        load_tensors(empty(), folder)
    assert "Traceback" not in capfd.readouterr().err
