"""Files of tensors: what the library safetensors reads, and no byte that may change unseen."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from toolmem import ToolmemError
from toolmem.checkpoints import tensor_files
from toolmem.checkpoints.tensor_files import DamagedError, TensorFile

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "turned": torch.arange(12).reshape(3, 4).t(),
    "byte": torch.tensor(-3, dtype=torch.int8),
    "half": torch.randn(5).bfloat16(),
    "flags": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "complex": torch.randn(3, dtype=torch.complex64),
    "unsigned": torch.from_numpy(np.arange(4, dtype=np.uint32)),
    "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    "long": torch.arange(5),
}


def bits(tensor):
    return tensor.contiguous().numpy().tobytes() if tensor.dtype not in (
        torch.bfloat16, torch.float8_e4m3fn
    ) else tensor.contiguous().view(torch.uint8).numpy().tobytes()  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_files.write(path, TENSORS, {"format": "pt", "said": 'é "quoted"'})
    return path


def test_round_trip(file):
    with TensorFile(file) as found:
        assert found.metadata["said"] == 'é "quoted"'
        assert found.entries.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            read = found.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bits(read) == bits(tensor), name


def test_the_library_reads_it(file):
    with safe_open(file, "pt") as found:
        assert found.metadata()["said"] == 'é "quoted"'
        assert set(found.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert bits(found.get_tensor(name)) == bits(tensor), name


def test_each_tensor_begins_at_a_multiple_of_its_items_size(file):
    with TensorFile(file) as found:
        for name, entry in found.entries.items():
            assert entry.begin % TENSORS[name].element_size() == 0, name


def test_every_changed_byte_is_found(file):
    data = file.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x21
        file.write_bytes(changed)
        with pytest.raises(DamagedError, match=file.name), TensorFile(file) as found:
            found.check()


def test_a_changed_tensor_is_named(file):
    with TensorFile(file) as found:
        place = found.entries["long"].begin + 3
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with TensorFile(file) as found:
        assert torch.equal(found.read("matrix"), TENSORS["matrix"])
        with pytest.raises(DamagedError, match="the tensor long is damaged"):
            found.check()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_cut_off_anywhere(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DamagedError), TensorFile(file) as found:
        found.check()


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(1).cdouble()]
)
def test_what_has_no_name_in_the_format(tmp_path, tensor):
    with pytest.raises(ToolmemError, match=r"x: a tensor of .* cannot be written"):
        tensor_files.write(tmp_path / "x", {"x": tensor}, {})


@pytest.mark.parametrize("length", [0x4B50, 0x10280])
def test_a_header_of_the_length_that_reads_like_torchs_own_files_is_none(length, tmp_path):
    """``PK`` begins a zip file, and is 19,280, a length that a header may have."""
    from toolmem import checkpoints

    path = tmp_path / "x.ckpt"

    def write(n):
        checkpoints.write({"state_dict": {"a": torch.ones(3)}, "pad": "x" * n}, path)
        return int.from_bytes(path.read_bytes()[:8], "little")

    n = length - write(0)
    while (found := write(n)) != length:
        n += length - found
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert checkpoints.read(path)["state_dict"]["a"].tolist() == [1, 1, 1]
