"""The header of a safetensors file: what the library writes is read, a forgery is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nanopost.models.header import Entry, read_header

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.zeros((), dtype=torch.float64),
    "c": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4, dtype=torch.float16),
}


def written(folder: Path) -> tuple[Path, dict, bytes]:
    """A file, its header as JSON and its numbers."""
    path = folder / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return path, json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: object, numbers: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_what_the_library_writes_is_read(tmp_path):
    path, header, numbers = written(tmp_path)
    found = read_header(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        begin, end = header[name]["data_offsets"]
        assert found[name] == Entry(tensor.dtype, tuple(tensor.shape), begin, end)
    rewrite(path, header, numbers)
    assert read_header(path) == found


def entry(**changes):
    """The header with another word about a.weight."""
    return lambda header: header | {"a.weight": header["a.weight"] | changes}


def moved(header, by):
    begin, end = header["a.weight"]["data_offsets"]
    return header | {"a.weight": header["a.weight"] | {"data_offsets": [begin + by, end + by]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(dtype="I64"), "a.weight has dtype 'I64'; nanopost reads F64, F32, F16, BF16"),
        (entry(shape=[3, 3]), r"a.weight has data_offsets .*: \[3, 3\] of F32 takes 36 bytes"),
        (entry(shape=[-2, -3]), r"a.weight has shape \[-2, -3\], no list of whole numbers"),
        (entry(shape=[2.0, 3]), "a.weight has shape"),
        (entry(shape=[True, 6]), "a.weight has shape"),
        (entry(shape=[2**62, 2**62, 0]), "a.weight has data_offsets"),
        (entry(data_offsets=[0]), "a.weight has data_offsets"),
        (entry(more=1), "a.weight must say dtype, shape and data_offsets and no more"),
        (lambda header: moved(header, -1), "begins at byte"),
        (lambda header: moved(header, 1), "begins at byte"),
        (lambda header: {k: v for k, v in header.items() if k != "c"}, "gap before it|the tensors have"),
        (lambda header: header | {"../x": header["a.weight"]}, "the tensor name '../x' has characters"),
        (lambda header: header | {"x" * 300: header["b"]}, "or too many"),
        (lambda header: header | {"copy": header["a.weight"]}, "overlaps what stands before it"),
        (lambda header: header | {"__metadata__": {"format": 1}}, "__metadata__ is no object of texts"),
        (lambda header: [header], "the header is a list, not an object"),
        (lambda header: b'{"b": 1, "b": 2}', "'b' stands in the header twice"),
        (lambda header: b"{" * 100_000, ""),
        (lambda header: b"\xff\xfe", ""),
    ],
)
def test_a_forged_header_is_refused_by_name(tmp_path, change, message):
    path, header, numbers = written(tmp_path)
    rewrite(path, change(header), numbers)
    with pytest.raises(ValueError, match=f"model.safetensors: .*(?:{message})"):
        read_header(path)


@pytest.mark.parametrize("head", [b"", b"\x00" * 8, b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}"])
def test_a_length_that_cannot_be_is_refused(tmp_path, head):
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(ValueError, match="x: no safetensors file: its header would have"):
        read_header(tmp_path / "x")
    with pytest.raises(ValueError, match="gone: No such file"):
        read_header(tmp_path / "gone")


@given(data=st.data())
def test_cut_or_lengthened_files_are_refused(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("cut"))[0]
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole) + 9).filter(lambda n: n != len(whole)))
    path.write_bytes((whole + b"\x00" * 9)[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        read_header(path)
