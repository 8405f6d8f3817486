"""GGUF files: header and blocks as the library gguf reads them, damage named."""

import numpy as np
import pytest
import torch

from toolmem import ToolmemError
from toolmem.models.interop.gguf import (
    BOOL,
    CODES,
    FLOAT32,
    INT32,
    STRING,
    TYPES,
    UINT32,
    DamagedGGUFError,
    GGUFFile,
    write_gguf,
)

gguf = pytest.importorskip("gguf")


class Held:
    def __init__(self, tensor):
        self.tensor, self.shape, self.torch_dtype = tensor, tuple(tensor.shape), tensor.dtype

    def read(self):
        return self.tensor


METADATA = {
    "general.architecture": (STRING, "llama"),
    "a.number": (UINT32, 7),
    "a.fraction": (FLOAT32, 0.5),
    "a.flag": (BOOL, True),
    "some.words": (STRING, ["é", "", "漢 字"]),
    "some.numbers": (INT32, [3, -1, 2]),
}


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 64),
        "b.weight": torch.randn(33),
        "c.weight": torch.randn(2, 3, 32),
    }


def written(path, kind="F32"):
    write_gguf(path, METADATA, {name: Held(one) for name, one in tensors().items()}, kind)
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_read_by_both(kind, tmp_path):
    path = written(tmp_path / "a.gguf", kind)
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        for key, (_, value) in METADATA.items():
            assert ours.metadata[key] == value == theirs.fields[key].contents()
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors] == list(tensors())
        for tensor in theirs.tensors:
            found = ours.tensors[tensor.name]
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(found.read().float().flatten(), torch.from_numpy(wanted).flatten())
            assert found.shape == tuple(tensors()[tensor.name].shape)
            assert found.begin == tensor.data_offset
            if kind == "F32":
                assert torch.equal(found.read(), tensors()[tensor.name])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_every_kind(kind, tmp_path):
    """A file of the library's own writer, its blocks made of random bytes with tame scales."""
    _, block, size = TYPES[CODES[kind]]
    rows, columns = 3, 2 * block
    draw = np.random.default_rng(1)
    raw = draw.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for start in range(0, raw.shape[1], size):
        for at in scales.get(kind, (0,)):
            raw[:, start + at : start + at + 2] = np.frombuffer(
                np.float16(0.01).tobytes(), np.uint8
            )
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        assert (file.tensors["w"].kind, file.tensors["w"].shape) == (kind, (rows, columns))
        wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert torch.equal(file.tensors["w"].read(), torch.from_numpy(wanted))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = written(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "b.gguf"
    for length in [*range(0, 400, 3), *range(400, len(whole) - 31, 61)]:
        path.write_bytes(whole[:length])
        with pytest.raises((DamagedGGUFError, ValueError)):  # an empty file cannot be mapped
            GGUFFile(path)
    path.write_bytes(whole[: len(whole) - 600])
    with pytest.raises(DamagedGGUFError, match=r"of the tensor c\.weight are missing"):
        GGUFFile(path)


def test_other_files_and_types_are_named(tmp_path):
    path = tmp_path / "b.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(ToolmemError, match="does not begin with GGUF"):
        GGUFFile(path)
    whole = bytearray(written(tmp_path / "a.gguf").read_bytes())
    whole[4] = 9
    path.write_bytes(whole)
    with pytest.raises(ToolmemError, match="version 9"):
        GGUFFile(path)
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    writer.add_tensor("blk.0.w", np.zeros((2, 66), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ToolmemError, match=r"blk\.0\.w is of type IQ2_XXS"):
        GGUFFile(path)
