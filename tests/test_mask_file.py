import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from subnet_ft.errors import ConfigError, MaskFormatError
from subnet_ft.mask import SubnetMask
from subnet_ft.mask_file import Checksum, checksum, decode_indices, encode_indices

SHAPES = {"sparse": (100, 10), "dense": (100, 10), "none": (5,), "odd": (67,)}


@pytest.fixture
def mask() -> SubnetMask:
    indices = {
        "sparse": torch.tensor([0, 7, 999]),
        "dense": torch.arange(0, 1000, 2),
        "odd": torch.arange(67),
    }
    return SubnetMask(
        indices,
        SHAPES,
        checksums={"sparse": "ab" * 8},
        metadata={"base_model": "base", "rule": "bitwise"},
        changed={"sparse": {"bitwise": 3, "abs:1e-5": 1}},
    )


def test_round_trip(mask: SubnetMask, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = SubnetMask.load(path)
    assert loaded == mask and list(loaded.shapes) == list(SHAPES)
    assert loaded.checksums == mask.checksums and loaded.metadata == mask.metadata
    assert loaded.changed == mask.changed
    assert list(tmp_path.iterdir()) == [path]
    keys = set(load_file(path))
    assert keys == {"sparse.indices", "dense.bitmap", "odd.bitmap"}
    with pytest.raises(ConfigError, match="does not exist"):
        mask.save(path)
    loaded.filter("dense").save(path, overwrite=True)
    assert set(SubnetMask.load(path).shapes) == {"dense"}


def test_file_is_what_the_specification_says(mask: SubnetMask, tmp_path: Path):
    """Read without our code: bits least significant first, padded to 8 bytes."""
    mask.save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        metadata = file.metadata()
        bitmap = file.get_tensor("odd.bitmap")
    assert (metadata["format"], metadata["version"]) == ("subnet_mask", "1")
    assert json.loads(metadata["parameters"])["none"] == {"shape": [5], "nnz": 0}
    assert bitmap.dtype == np.uint8 and len(bitmap) == 16
    assert bitmap.tolist() == [255] * 8 + [7] + [0] * 7


def test_loading_reads_no_indices(mask: SubnetMask, tmp_path: Path, monkeypatch):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = SubnetMask.load(path)
    small = pickle.dumps(loaded)
    assert pickle.loads(small) == mask
    path.unlink()
    assert loaded.counts == mask.counts and loaded.density == mask.density
    assert "dense" in loaded and len(small) < 400
    with pytest.raises(MaskFormatError, match=r"dense.bitmap"):
        loaded["dense"]


def test_wide_indices_stay_aligned(tmp_path: Path):
    shapes = {"small": (5,), "wide": (2, 2**31)}
    mask = SubnetMask({"small": torch.tensor([1]), "wide": torch.tensor([2**31])}, shapes)
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    assert SubnetMask.load(path) == mask and list(SubnetMask.load(path)) == ["small", "wide"]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])["wide.indices"]
    assert entry["dtype"] == "I64" and (8 + length + entry["data_offsets"][0]) % 8 == 0


@pytest.mark.parametrize("numel", [1, 8, 63, 64, 65, 1000])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_codec_round_trip_takes_the_smaller(numel: int, density: float):
    indices = torch.nonzero(torch.rand(numel) < density).view(-1).int()
    kind, tensor = encode_indices(indices, numel)
    assert torch.equal(decode_indices(kind, tensor, numel), indices)
    assert tensor.nbytes == min(4 * len(indices), (numel + 63) // 64 * 8)


def test_decode_refuses_bits_beyond_the_parameter():
    with pytest.raises(MaskFormatError, match=r"\[0, 60\)"):
        decode_indices("bitmap", torch.full((8,), 255, dtype=torch.uint8), 60)
    with pytest.raises(MaskFormatError, match="uint8 of shape"):
        decode_indices("bitmap", torch.zeros(7, dtype=torch.uint8), 60)


def test_checksum_is_of_bf16_bytes_in_any_pieces():
    values = torch.randn(100)
    assert checksum(values) == checksum(values.bfloat16()) != checksum(values + 0.1)
    assert re.fullmatch("[0-9a-f]{16}", checksum(values))
    pieces = Checksum()
    for part in values.split(33):
        pieces.update(part.numpy())
    assert pieces.hexdigest() == checksum(values)


def rewrite(path: Path, change) -> None:
    """Load a mask file without our code, change it, write it back."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    records = json.loads(metadata["parameters"])
    change(tensors, metadata, records)
    if "parameters" in metadata:
        metadata["parameters"] = json.dumps(records)
    save_file(tensors, path, metadata=metadata)


HEADER_FAULTS = {
    "format": lambda t, m, r: m.update(format="other"),
    "version": lambda t, m, r: m.update(version="2"),
    "no parameters": lambda t, m, r: m.pop("parameters"),
    "missing tensor": lambda t, m, r: t.pop("sparse.indices"),
    "extra tensor": lambda t, m, r: t.update(stray=torch.zeros(1)),
    "unnamed parameter": lambda t, m, r: r.pop("dense"),
    "nnz disagrees": lambda t, m, r: r["sparse"].update(nnz=4),
    "nnz beyond numel": lambda t, m, r: r["none"].update(nnz=6),
    "nnz a bool": lambda t, m, r: r["none"].update(nnz=False),
    "shape negative": lambda t, m, r: r["none"].update(shape=[-5]),
    "shape missing": lambda t, m, r: r["none"].pop("shape"),
    "both kinds": lambda t, m, r: t.update({"sparse.bitmap": torch.zeros(128, dtype=torch.uint8)}),
}
DATA_FAULTS = {
    "out of range": lambda t, m, r: t["sparse.indices"].copy_(torch.tensor([0, 7, 1000])),
    "negative": lambda t, m, r: t["sparse.indices"].copy_(torch.tensor([-1, 7, 99])),
    "unsorted": lambda t, m, r: t["sparse.indices"].copy_(torch.tensor([7, 0, 99])),
    "floating": lambda t, m, r: t.update({"sparse.indices": torch.zeros(3)}),
    "bitmap length": lambda t, m, r: (
        t.pop("sparse.indices"),
        t.update({"sparse.bitmap": torch.zeros(120, dtype=torch.uint8)}),
    ),
    "bitmap nnz": lambda t, m, r: (
        t.pop("sparse.indices"),
        t.update({"sparse.bitmap": torch.zeros(128, dtype=torch.uint8)}),
    ),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_malformed_header(fault: str, mask: SubnetMask, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    rewrite(path, HEADER_FAULTS[fault])
    with pytest.raises(MaskFormatError, match=re.escape(str(path))) as error:
        SubnetMask.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_malformed_indices(fault: str, mask: SubnetMask, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    rewrite(path, DATA_FAULTS[fault])
    loaded = SubnetMask.load(path)
    with pytest.raises(MaskFormatError, match=r"mask.safetensors: sparse\.(indices|bitmap)"):
        loaded["sparse"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps({"w": [1]}), b"\xff" * 64])
def test_not_safetensors(content: bytes, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(content)
    with pytest.raises(MaskFormatError, match="expected a mask file"):
        SubnetMask.load(path)
    with pytest.raises(MaskFormatError, match="expected a mask file"):
        SubnetMask.load(tmp_path / "absent")


def test_truncated(mask: SubnetMask, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaskFormatError):
        SubnetMask.load(path)


def test_nothing_is_left_of_a_failed_write(mask: SubnetMask, tmp_path: Path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("subnet_ft.mask_file.encode_indices", fail)
    with pytest.raises(OSError, match="disk full"):
        mask.save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())
