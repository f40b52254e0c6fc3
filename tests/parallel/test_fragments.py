"""Any cut written is read back by any other cut; damage and gaps are noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.fragments import Fragment, FragmentReader, measure_file, write_bytes, write_tensors


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "empty": torch.zeros(0),
        "half": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "view": torch.arange(12.0).view(3, 4).t(),
    }
    written = write_tensors(tmp_path / "x.safetensors", tensors)
    assert written == measure_file(tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 200), st.integers(1, 7), st.integers(1, 7))
def test_any_world_reads_what_any_world_wrote(tmp_path: Path, numel: int, writers: int, readers: int) -> None:
    whole = torch.arange(float(numel))
    fragments: dict[str, list[Fragment]] = {}
    part = -(-numel // writers)
    for rank in range(writers):
        low, high = min(rank * part, numel), min((rank + 1) * part, numel)
        flat = torch.cat([torch.full((rank,), -1.0), whole[low:high]])
        write_tensors(tmp_path / f"{rank}.safetensors", {"param/0": flat})
        fragments[f"{rank}.safetensors"] = [Fragment("w", low, high - low, "param/0", rank)] if low < high else []
    reader = FragmentReader(tmp_path, fragments)
    part = -(-numel // readers)
    for rank in range(readers):
        low, high = min(rank * part, numel), min((rank + 1) * part, numel)
        target = torch.full((high - low,), float("nan"))
        reader.read_into(target, "param", "w", low)
        assert torch.equal(target, whole[low:high])


def test_a_gap_is_an_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "0.safetensors", {"param/0": torch.zeros(4)})
    reader = FragmentReader(tmp_path, {"0.safetensors": [Fragment("w", 0, 4, "param/0", 0)]})
    with pytest.raises(CheckpointError, match="param of 'w' lacks 2 of 6 elements from 0"):
        reader.read_into(torch.zeros(6), "param", "w", 0)
    assert reader.has("param", "w")
    assert not reader.has("ema", "w")


def test_small_files_are_replaced_in_one_go(tmp_path: Path) -> None:
    write_bytes(tmp_path / "latest", b"one")
    write_bytes(tmp_path / "latest", b"two")
    assert (tmp_path / "latest").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_the_directory_of_a_small_file_may_be_renamed_as_soon_as_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 commits a checkpoint when it sees the last rank's file, which that rank may not have flushed yet."""
    folder, rename = tmp_path / "temporary", Path.rename
    folder.mkdir()

    def renamed_by_another(self: Path, target: Path) -> Path:
        rename(self, target)
        return rename(folder, tmp_path / "final")

    monkeypatch.setattr(Path, "rename", renamed_by_another)
    write_bytes(folder / "rank.json", b"{}")
    assert (tmp_path / "final" / "rank.json").read_bytes() == b"{}"
