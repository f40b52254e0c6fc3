"""The whole command line against object stores: S3 (moto's server) written and read, a web server read by byte ranges."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest

from data_tools.cli import main
from hermes_dist.shards.remote import open_storage
from hermes_dist.shards.store import open_store
from tests.servers import SECRETS, s3_bucket, serve


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as url:
        yield url


@pytest.fixture
def shard(monkeypatch, capsys):
    """Runs one command in this process: (exit code, everything it printed)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hermes-shard", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = "".join(capsys.readouterr())
        assert not any(secret in printed for secret in SECRETS)
        return ended.value.code or 0, printed

    return run


def exported_label(shard, url, folder):
    code, printed = shard("export", url, "--case", "case_2", "--out", folder / "label.nii.gz")
    assert code == 0, printed
    return np.asarray(nib.load(folder / "label.nii.gz").dataobj).T


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_a_store_lives_in_s3(format, bucket, shard, nnunet, tmp_path, raw):
    local, url = tmp_path / "local", f"{bucket}/{format}/nested"
    assert shard("convert", nnunet, "--out", local, "--format", format)[0] == 0
    code, printed = shard("convert", nnunet, "--out", url, "--format", format)
    assert code == 0, printed
    assert "4 converted" in printed
    assert f"to {url}" in printed
    assert open_store(url).collection == open_store(str(local)).collection
    assert "4 unchanged" in shard("convert", nnunet, "--out", url, "--format", format)[1]
    file = nnunet / "imagesTr" / "case_1_0000.nii.gz"
    good = file.read_bytes()
    file.write_bytes(good[:300])
    code, printed = shard("convert", nnunet, "--out", url, "--format", format)
    assert code == 1
    assert "quarantined: Toy/case_1" in printed
    file.write_bytes(good)
    assert "1 converted, 3 unchanged" in shard("convert", nnunet, "--out", url, "--format", format)[1]
    assert shard("verify", url)[0] == 0
    assert "organ (4), tumour (4)" in " ".join(shard("info", url)[1].split())
    np.testing.assert_array_equal(exported_label(shard, url, tmp_path), raw.make_volume(2)[1])
    assert shard("stats", url, "--out", tmp_path / "s.html", "--montage", 1)[0] == 0
    storage = open_storage(url)
    names = list(storage.list(""))
    assert not [n for n in names if ".staging" in n]
    assert not [n for n in names if any(s.encode() in storage.read(n) for s in SECRETS)]
    storage.write(next(n for n in names if n.endswith(("/0", ".tar"))), b"not what was written")
    code, printed = shard("verify", url)
    assert code == 1
    assert "damaged" in printed


def test_hosts_share_the_work_through_the_bucket(bucket, shard, nnunet, tmp_path):
    url = f"{bucket}/parts"
    assert shard("convert", nnunet, "--out", tmp_path / "whole")[0] == 0
    assert shard("convert", nnunet, "--out", url, "--part", "1/2")[0] == 0
    code, printed = shard("merge", url)
    assert code == 1
    assert "were not converted yet" in printed
    assert shard("convert", nnunet, "--out", url, "--part", "2/2")[0] == 0
    assert shard("merge", url)[0] == 0
    assert open_store(url).collection.digest == open_store(str(tmp_path / "whole")).collection.digest


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_a_web_server_is_read_by_ranges(format, shard, nnunet, tmp_path, raw):
    assert shard("convert", nnunet, "--out", tmp_path / "store", "--format", format)[0] == 0
    with serve(tmp_path / "store") as server:
        code, printed = shard("verify", server.url)
        assert code == 0, printed
        assert "organ (4), tumour (4)" in " ".join(shard("info", server.url)[1].split())
        server.ranges.clear()
        np.testing.assert_array_equal(exported_label(shard, server.url, tmp_path), raw.make_volume(2)[1])
        assert server.ranges
        code, printed = shard("convert", nnunet, "--out", f"{server.url}/new")
        assert code == 1
        assert "error: " in printed


@pytest.mark.parametrize("url", ["s3://KEY:SECRETKEY@shards/x", "https://host/x?token=SECRETKEY"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url, shard, nnunet):
    code, printed = shard("convert", nnunet, "--out", url)
    assert code == 1
    assert "environment" in printed
