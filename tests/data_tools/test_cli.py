"""The command line as people use it: output, exit codes, and a kill at any instant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from hermes_dist.shards.store import open_store

PROGRAM = [sys.executable, "-c", "from data_tools.cli import main; main()"]


def shard(*arguments):
    result = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_check_convert_verify_info_export_stats(nnunet, tmp_path, raw):
    store, report = tmp_path / "store", tmp_path / "integrity.json"
    good = shard("check", nnunet, "--json", report)
    assert (good.returncode, json.loads(report.read_text())) == (0, [])
    converted = shard("convert", nnunet, "--out", store)
    assert converted.returncode == 0, converted.stderr
    assert "4 converted" in converted.stdout
    assert "forecast" in converted.stdout
    assert "wrote 4 cases" in converted.stdout
    info = shard("info", store)
    assert "organ (4), tumour (4)" in " ".join(info.stdout.split())
    exported = shard("export", store, "--case", "case_2", "--out", tmp_path / "label.nii.gz")
    assert exported.returncode == 0, exported.stderr
    scan = nib.load(tmp_path / "label.nii.gz")
    _, label, affine = raw.make_volume(2)
    np.testing.assert_array_equal(np.asarray(scan.dataobj).T, label)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    assert shard("stats", store, "--out", tmp_path / "s.html", "--montage", 1).returncode == 0
    assert "data:image/png" in (tmp_path / "s.html").read_text()
    assert shard("verify", store).returncode == 0
    shards = [p for p in store.rglob("*") if p.is_file() and p.name == "0"]
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    verified = shard("verify", store)
    assert verified.returncode == 1
    assert "another checksum" in verified.stderr


def test_a_bad_case_ends_with_one_and_its_name(nnunet, tmp_path):
    file = nnunet / "imagesTr" / "case_2_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:300])
    checked = shard("check", nnunet, "--json", tmp_path / "i.json")
    assert checked.returncode == 1
    (row,) = [r for r in json.loads((tmp_path / "i.json").read_text()) if r["severity"] == "reject"]
    assert (row["case_id"], row["check"], row["file"]) == ("case_2", "truncated", str(file))
    converted = shard("convert", nnunet, "--out", tmp_path / "store")
    assert converted.returncode == 1
    assert "quarantined: Toy/case_2" in converted.stdout
    assert len(open_store(str(tmp_path / "store")).manifest) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert", "--out", "x"], "name either raw datasets"),
        (["convert", "nowhere", "--out", "x"], "does not exist"),
        (["convert", "s3://bucket/nowhere", "--out", "x"], "mount or copy the bucket"),
        (["convert", "SRC", "--out", "x", "--format", "zar"], "Did you mean 'zarr'"),
        (["convert", "SRC", "--out", "x", "--layout", "nnunt"], "Did you mean 'nnunet'"),
        (["convert", "SRC", "--out", "x", "--part", "5/4"], "expected i/n"),
        (["convert", "SRC", "--out", "x", "--spacing", "a,b"], "expected z,y,x"),
        (["info", "nowhere"], "no finished shard store"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, text, nnunet, tmp_path):
    arguments = [str(nnunet) if a == "SRC" else str(tmp_path / a) if a in ("x", "nowhere") else a for a in arguments]
    result = shard(*arguments)
    assert text in result.stderr
    assert result.returncode == (1 if "nowhere" in str(arguments) else 2)


@pytest.mark.faults
def test_kill_nine_then_the_same_command_goes_on(tmp_path, raw):
    source = raw.make_nnunet(tmp_path / "Dataset001_Toy", cases=12)
    whole, out = tmp_path / "whole", tmp_path / "store"
    assert shard("convert", source, "--out", whole).returncode == 0
    rows = out / ".staging" / "rows"
    process = subprocess.Popen([*PROGRAM, "convert", source, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(1 for _ in rows.rglob("*.json")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = shard("convert", source, "--out", out)
    assert again.returncode == 0, again.stderr
    if not out.joinpath("manifest.parquet").stat().st_size:
        raise AssertionError("empty manifest")
    assert int(again.stdout.split(" unchanged")[0].split()[-1]) >= 3
    a, b = open_store(str(whole)), open_store(str(out))
    assert a.collection.digest == b.collection.digest
    assert not any((out / ".staging").rglob("*.json"))
