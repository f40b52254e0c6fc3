"""JSON lines: whole or absent, strict JSON, shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hermes_dist.telemetry import jsonl
from hermes_dist.telemetry.jsonl import JsonlFile, RowFollower, encode, last_row, read_rows

WRITER = """
import sys
from pathlib import Path
from hermes_dist.telemetry.jsonl import JsonlFile
file = JsonlFile(Path(sys.argv[1]))
for i in range(int(sys.argv[3])):
    file.append({"writer": sys.argv[2], "step": i, "text": "x" * (i % 500)})
"""


def test_scalars_of_numpy_and_torch_and_nan_become_strict_json() -> None:
    row = {
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": float("nan"),
        "d": {"e": np.int64(2)},
        "f": float("inf"),
        "g": (1, True),
    }
    assert json.loads(encode(row)) == {"a": 0.5, "b": 3, "c": None, "d": {"e": 2}, "f": None, "g": [1, True]}


def test_floats_keep_every_bit() -> None:
    value = 0.1 + 0.2
    assert json.loads(encode({"loss": value}))["loss"] == value


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b"x" * 10_000])
def test_a_torn_last_line_is_removed_at_the_next_opening(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + torn)
    file = JsonlFile(path)
    file.append({"step": 1})
    file.close()
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"ste')
    JsonlFile(path).close()
    assert path.read_bytes() == b""


def test_steps_after_the_resume_point_are_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl")
    for step in range(5):
        file.append({"step": step})
    file.keep_steps_before(3)
    file.append({"step": 3})
    file.close()
    assert [row["step"] for row in read_rows(file.path)] == [0, 1, 2, 3]


def test_two_processes_share_a_file_without_mixing_lines(tmp_path: Path) -> None:
    path = tmp_path / "stream.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, "300"]) for name in "ab"]
    assert [w.wait(60) for w in writers] == [0, 0]
    rows = list(read_rows(path))
    for name in "ab":
        assert [r["step"] for r in rows if r["writer"] == name] == list(range(300))


def test_a_killed_writer_leaves_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "a", "1000000"])
    while not path.is_file() or path.stat().st_size < 10_000:
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    JsonlFile(path).close()
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))


def test_lines_that_find_no_space_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk takes a part of a line: no half line is left, and the run goes on."""
    file = JsonlFile(tmp_path / "metrics.jsonl")
    file.append({"step": 0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:4]))
    file.append({"step": 1})
    file.append({"step": 2})
    assert [row["step"] for row in read_rows(file.path)] == [0]
    assert file.path.read_bytes().endswith(b"}\n")
    assert capsys.readouterr().err.count("no space left") == 1
    monkeypatch.undo()
    file.append({"step": 3})
    file.close()
    assert [row["step"] for row in read_rows(file.path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [28, 5])
def test_lines_are_lost_with_a_warning_and_failing_storage_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl")

    def fails(fd: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fails)
    if number != 28:
        with pytest.raises(OSError, match="Input/output"):
            file.append({"step": 0})
        return
    file.append({"step": 0})
    file.close()
    assert "1 lines are lost: No space left on device" in capsys.readouterr().err


def test_not_everything_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_LATE", 3)
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    file = JsonlFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.append({"step": step})
    with pytest.raises(OSError, match="no space left"):
        file.append({"step": 3})


def test_a_follower_gives_new_whole_rows_and_starts_again_after_a_resume(tmp_path: Path) -> None:
    follower, file = RowFollower(tmp_path / "m.jsonl"), JsonlFile(tmp_path / "m.jsonl")
    file.append({"step": 0})
    assert follower.read() == (True, [{"step": 0}])
    file.append({"step": 1})
    with file.path.open("ab") as torn:
        torn.write(b'{"step": 2')
    assert follower.read() == (False, [{"step": 1}])
    assert last_row(file.path) == {"step": 1}
    file.close()
    resumed = JsonlFile(file.path)
    resumed.keep_steps_before(1)
    assert follower.read() == (True, [{"step": 0}])
    resumed.close()
    assert last_row(tmp_path / "nowhere") is None
