"""`launch/predict.py` as a person runs it: every format in, NIfTI on the scan's own grid out, clear ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_tools import mask_writer
from data_tools.scans import find_scans, read_scan
from hermes_dist.errors import SourceError
from hermes_dist.volume.geometry import Grid
from launch import predict
from tests.train.tiny_run import make_run

ROOT = Path(__file__).resolve().parents[2]
SHAPE_XYZ = (26, 30, 22)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Done]:
    """The command in this process (importing torch for every call would take seconds)."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments), "--device", "cpu", "--threads", "1"])
        try:
            code = predict.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = capsys.readouterr()
        return Done(code, output.out, output.err)

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """An oblique int16 CT, sform code 2, qform code 1, with odd but legal header entries."""
    affine = np.array([[-1.4, 0.2, 0, 30], [0.2, 1.6, 0.0, -9], [0, 0, 2.5, 4], [0, 0, 0, 1.0]])
    affine[:3, :3] = np.linalg.svd(affine[:3, :3] / [1.4, 1.6, 2.5])[0] @ np.linalg.svd(affine[:3, :3])[2] * [1.4, 1.6, 2.5]
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE_XYZ], indexing="ij")
    values = np.where(x**2 + y**2 + z**2 < 0.9, 60 + 90 * np.sin(4 * x), -1000).astype(np.int16)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    image.header["descrip"] = b"from the scanner"
    path = tmp_path_factory.mktemp("scan") / "case7_0000.nii.gz"
    nib.save(image, path)
    return path


def test_one_file_per_task_on_the_scans_grid(command, run, scan, tmp_path):
    done = command("--run", run, "--input", scan, "--modality", "CT", "--tasks", "tumour,organs/liver", "--out", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "m" / "case7"
    assert sorted(p.name for p in folder.iterdir()) == ["organs__liver.nii.gz", "organs__tumour.nii.gz", "prediction.json"]
    source, mask = nib.load(scan), nib.load(folder / "organs__liver.nii.gz")
    assert mask.shape == source.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, source.affine)
    for key in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b", "descrip"):
        np.testing.assert_array_equal(mask.header[key], source.header[key])
    values = np.asarray(mask.dataobj)
    assert set(np.unique(values)) <= {0, 1}
    sidecar = json.loads((folder / "prediction.json").read_text())
    assert [t["name"] for t in sidecar["tasks"]] == ["organs/tumour", "organs/liver"]
    assert sidecar["tasks"][1]["voxels"] == values.sum()
    assert sidecar["tasks"][1]["volume_ml"] == pytest.approx(values.sum() * abs(np.linalg.det(mask.affine)) / 1000, abs=1e-3)
    assert (sidecar["modality"], sidecar["threshold"], sidecar["run"]) == ("CT", 0.5, str(run))


def test_a_folder_of_formats_as_label_maps(command, run, scan, tmp_path):
    """The same voxels as NRRD and MetaImage give the same map; a damaged scan is named and the others are done."""
    image = sitk.ReadImage(str(scan))
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.nrrd", "b.mha", "c.nii"):
        sitk.WriteImage(image, str(folder / name))
    (folder / "d.nii.gz").write_bytes(scan.read_bytes()[:-60])
    done = command("--run", run, "--input", folder, "--modality", "CT", "--tasks", "all", "--out", tmp_path / "m", "--multilabel")
    assert done.returncode == 1
    assert "d.nii.gz" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1 of 4 scans failed" in done.stderr
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [f"{n}.{e}" for n in "abc" for e in ("json", "nii.gz")]
    maps = [nib.load(tmp_path / "m" / f"{n}.nii.gz") for n in "abc"]
    for other in maps[:2]:
        np.testing.assert_array_equal(np.asarray(other.dataobj), np.asarray(maps[2].dataobj))
        np.testing.assert_allclose(other.affine, maps[2].affine, atol=1e-4)
    sidecar = json.loads((tmp_path / "m" / "a.json").read_text())
    assert [(t["name"], t["value"]) for t in sidecar["tasks"]] == [("organs/liver", 1), ("organs/tumour", 2)]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--tasks": "livre"}, 2, ["livre", "Did you mean 'liver'"]),
        ({"--modality": "MRT1"}, 2, ["MRT1", "CT", "T1"]),
        ({"--input": "broken"}, 1, ["broken.nii.gz"]),
        ({"--input": "missing.nii.gz"}, 1, ["missing.nii.gz", "does not exist"]),
        ({"--run": "nowhere"}, 2, ["nowhere", "does not exist"]),
    ],
)
def test_bad_use_ends_with_one_clear_message(command, run, scan, tmp_path, changes, code, words):
    if changes.get("--input") == "broken":
        changes = {"--input": tmp_path / "broken.nii.gz"}
        changes["--input"].write_bytes(scan.read_bytes()[:-60])
    options = {"--run": run, "--input": scan, "--modality": "CT", "--tasks": "liver", "--out": tmp_path / "out", **changes}
    done = command(*[v for pair in options.items() for v in pair])
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_help_shows_an_example():
    line = [sys.executable, "launch/predict.py", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "python launch/predict.py --run" in done.stdout


# The parts that the command is made of


def test_which_scans_a_folder_holds(scan, tmp_path):
    assert list(find_scans(scan)) == ["case7"]
    for name in ("b.nii", "a_0000.nii", ".hidden.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert list(find_scans(tmp_path)) == ["a", "b"]
    (tmp_path / "b.nii.gz").touch()
    with pytest.raises(SourceError, match="both be case 'b'"):
        find_scans(tmp_path)
    with pytest.raises(SourceError, match="no reader for this file ending"):
        find_scans(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no scan"):
        find_scans(tmp_path / "empty")


def test_four_dimensional_scans_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.float32), np.eye(4)), tmp_path / "x.nii")
    with pytest.raises(SourceError, match="one 3D channel per file"):
        read_scan(tmp_path / "x.nii")


def test_smaller_structures_lie_on_top_and_overlap_is_counted(tmp_path):
    grid = Grid(np.diag([1.0, 1.0, 2.0, 1.0]), (4, 4, 4))
    small, large = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    small[1:3, 1, 1] = True
    like = tmp_path / "scan.mha"
    files = mask_writer.write_multilabel(tmp_path / "m.nii.gz", [("d/s", small), ("d/l", large)], grid, like=like, about={})
    label = np.asarray(nib.load(files[0]).dataobj).T
    np.testing.assert_array_equal(label, np.where(small, 1, 2))
    sidecar = json.loads(files[1].read_text())
    assert sidecar["overlap_voxels"] == 2
    assert [t["voxels"] for t in sidecar["tasks"]] == [2, 64]
    assert sidecar["tasks"][0]["volume_ml"] == 0.004


def test_a_failure_in_mid_scan_leaves_what_was_there(tmp_path):
    grid = Grid(np.eye(4), (2, 2, 2))
    mask = np.ones((2, 2, 2), bool)
    like = tmp_path / "scan.mha"
    mask_writer.write_separate(tmp_path / "case", [("d/a", mask)], grid, like=like, about={})

    def dies():
        yield "d/b", mask
        raise KeyboardInterrupt

    for write in (mask_writer.write_separate, mask_writer.write_multilabel):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "case", dies(), grid, like=like, about={})
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["d__a.nii.gz", "prediction.json"]


def test_names_of_files():
    assert mask_writer.safe_name("amos ct/left kidney (L)") == "amos_ct__left_kidney__L_"
    assert mask_writer.safe_name("../..") == "__.."
    assert "/" not in mask_writer.safe_name("a/b/c")
