"""Where the ranks of a host find their private Ray cluster: a folder that nobody else may write to."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hermes_dist.errors import ConfigError

ray_cluster = pytest.importorskip("hermes_dist.stream.ray_cluster")


def test_the_rendezvous_lies_in_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = ray_cluster.rendezvous_path().parent
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"only user \d+ may use.*drwxrwxrwx.*TMPDIR"):
        ray_cluster.rendezvous_path()


def test_a_link_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = ray_cluster.rendezvous_path().parent
    folder.rmdir()
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    folder.symlink_to(other)
    with pytest.raises(ConfigError, match="must be a folder"):
        ray_cluster.rendezvous_path()
