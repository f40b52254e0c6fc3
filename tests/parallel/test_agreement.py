"""What all ranks must see alike, with the other ranks' part played."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hermes_dist.errors import CheckpointError
from hermes_dist.parallel.agreement import ask_rank_0, check_shared


def played(rank: int, *, answer: str | None = None, unseen_elsewhere: int = 0) -> Any:
    """A rank among two: `answer` is what the other one, as rank 0, says."""

    def gather_lines(lines: list[str]) -> list[str]:
        return lines if answer is None else [json.dumps({"answer": answer})]

    return SimpleNamespace(
        rank=rank, world_size=2, limit_s=0.2, gather_lines=gather_lines, sum=lambda tensor: tensor + unseen_elsewhere
    )


def test_a_directory_that_all_see_passes_and_keeps_nothing(tmp_path: Path) -> None:
    check_shared(tmp_path / "checkpoints", played(0))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    (tmp_path / ".shared-abc").touch()
    check_shared(tmp_path, played(1, answer=".shared-abc"))


def test_a_host_with_a_directory_of_its_own_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="1 of 2 ranks do not see a file that rank 0 wrote there.*run.output_dir"):
        check_shared(tmp_path, played(1, answer=".shared-abc"))
    assert f"does not see {tmp_path / '.shared-abc'}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="1 of 2 ranks do not see"):
        check_shared(tmp_path, played(0, unseen_elsewhere=1))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_rank_0_is_everybodys(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    with pytest.raises(CheckpointError, match="Read-only file system"):
        ask_rank_0(played(0), fails)
