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
import torch

from data_tools import mask_writer
from data_tools.scans import find_scans, read_scan, scan_name
from data_tools.sources.raw import RawVolume
from hermes_dist.errors import SourceError
from hermes_dist.volume.geometry import Grid
from launch import predict
from tests.train.tiny_run import add_checkpoints, make_run

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


def test_masks_say_which_checkpoint_they_are_of(command, scan, tmp_path):
    run = make_run(tmp_path)
    add_checkpoints(run, [10, 20], best=10)
    line = ["--run", run, "--input", scan, "--modality", "CT", "--tasks", "organs/liver", "--out", tmp_path / "m"]
    digests = set()
    for more, step in ((["--checkpoint", "best"], 10), ([], 20)):
        done = command(*line, *more)
        assert done.returncode == 0, done.stderr
        stated = json.loads((tmp_path / "m" / "case7" / "prediction.json").read_text())
        assert (stated["checkpoint"], stated["chosen"]) == (f"step_{step:08d}", more[-1] if more else "newest")
        assert f"{run}: step_{step:08d} ({stated['chosen']}), weights {stated['weights']}" in done.stdout
        digests.add(stated["weights"])
    assert len(digests) == 2
    done = command(*line, "--checkpoint", "30")
    assert done.returncode == 1
    assert "there are checkpoints of the steps 10 (best), 20." in done.stderr


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
        ({"--out": "/proc/masks"}, 2, ["--out /proc/masks cannot be written to"]),
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


@pytest.mark.parametrize(("option", "value"), [("--threads", "-1"), ("--threads", "0"), ("--device", "cuda:99")])
def test_options_that_this_machine_cannot_honour(run, scan, tmp_path, monkeypatch, capsys, option, value):
    line = ["predict.py", "--run", run, "--input", scan, "--modality", "CT", "--tasks", "liver", "--out", tmp_path, option, value]
    monkeypatch.setattr(sys, "argv", [str(part) for part in line])
    with pytest.raises(SystemExit) as end:
        predict.main()
    assert end.value.code == 2
    assert value in capsys.readouterr().err


def folder_of(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("source", "out", "multilabel", "words"),
    [
        ("series", ".", False, "series would be written over or into the input"),  # OUT/series is the series
        ("ct.nii.gz", ".", True, "ct.nii.gz would be written over or into the input"),
        ("series", "series", False, "would be written over or into the input"),
        ("series/../ct.nii.gz", "series/..", True, "would be written over or into the input"),
        ("deep", "..", False, "would be written over or into the input"),  # the target holds the scan
        (".", ".", True, "choose another --out"),
        ("nrrd", "nrrd", True, "would lie among the scans"),
        ("ct.nii.gz", "others", False, "not a folder of masks alone (it holds notes.txt)"),
        ("ct.nii.gz", "others", True, "ct.json exists and is no prediction"),
        ("ct.nii.gz", "others/ct/notes.txt", True, "is a file"),
    ],
)
def test_scans_and_other_files_are_never_replaced(command, scan, tmp_path, monkeypatch, source, out, multilabel, words):
    """Refused before the model is loaded: the run does not even exist."""
    here = tmp_path / "deep"
    (here / "series").mkdir(parents=True)
    for number in range(3):
        (here / "series" / f"{number}.dcm").write_bytes(bytes(128) + b"DICM")
    (here / "ct.nii.gz").write_bytes(scan.read_bytes())
    (here / "nrrd").mkdir()
    (here / "nrrd" / "a.nrrd").write_bytes(b"NRRD0004")
    (here / "others" / "ct").mkdir(parents=True)
    (here / "others" / "ct" / "notes.txt").write_text("mine")
    (here / "others" / "ct.json").write_text('{"tasks": "of another program"}')
    if source == "deep":
        (tmp_path / "deep" / "deep.nii.gz").write_bytes(scan.read_bytes())
        source = "deep.nii.gz"
    monkeypatch.chdir(here)
    before = folder_of(tmp_path)
    more = ["--multilabel"] if multilabel else []
    done = command("--run", "nowhere", "--input", source, "--modality", "CT", "--tasks", "all", "--out", out, *more)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert folder_of(tmp_path) == before


def test_an_earlier_prediction_is_replaced(command, run, scan, tmp_path):
    out = tmp_path / "m"
    options = ["--run", run, "--input", scan, "--modality", "CT", "--out", out]
    for tasks in ("tumour", "liver"):
        assert command(*options, "--tasks", tasks).returncode == 0
        assert command(*options, "--tasks", tasks, "--multilabel").returncode == 0
    assert sorted(folder_of(out)) == ["case7.json", "case7.nii.gz", "case7/organs__liver.nii.gz", "case7/prediction.json"]
    (out / "case7" / "corrected.nii.gz").write_bytes(b"by hand")
    done = command(*options, "--tasks", "liver")
    assert done.returncode == 2
    assert "it holds corrected.nii.gz" in done.stderr
    assert (out / "case7" / "corrected.nii.gz").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")])
def test_a_scan_that_needs_too_much_memory_is_named_and_the_others_go_on(command, run, scan, tmp_path, monkeypatch, error):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(scan.read_bytes())

    def read(path: Path) -> RawVolume:
        if path.name == "a.nii.gz":
            raise error
        return read_scan(path)

    monkeypatch.setattr(predict, "read_scan", read)
    options = {"--run": run, "--input": tmp_path / "in", "--modality": "CT", "--tasks": "liver", "--out": tmp_path / "m"}
    done = command(*[v for pair in options.items() for v in pair])
    assert done.returncode == 1
    assert f"error: a: {tmp_path / 'in' / 'a.nii.gz'}: not enough memory" in done.stderr
    assert "1 of 2 scans failed" in done.stderr
    assert (tmp_path / "m" / "b" / "prediction.json").exists()


def test_help_shows_an_example():
    line = [sys.executable, "launch/predict.py", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "python launch/predict.py --run" in done.stdout


# The parts that the command is made of


def test_which_scans_a_folder_holds(scan, tmp_path):
    assert list(find_scans(scan)) == ["case7"]
    (tmp_path / "inner").mkdir()
    assert scan_name(tmp_path / "inner" / "..") == tmp_path.name
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


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    grid, mask, like = Grid(np.eye(4), (2, 2, 2)), np.ones((2, 2, 2), bool), tmp_path / "scan.mha"
    mask_writer.write_separate(tmp_path / "case", [("d/a", mask)], grid, like=like, about={})
    with monkeypatch.context() as patched:
        rename = Path.rename

        def killed(path: Path, target: Path) -> None:
            rename(path, target)
            if target.name == ".case.old":
                raise KeyboardInterrupt

        patched.setattr(Path, "rename", killed)
        patched.setattr(mask_writer.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            mask_writer.write_separate(tmp_path / "case", [("d/b", mask)], grid, like=like, about={})
    left = {p.name for p in tmp_path.rglob("*.nii.gz")}
    assert left == {"d__a.nii.gz", "d__b.nii.gz"}
    mask_writer.write_separate(tmp_path / "case", [("d/c", mask)], grid, like=like, about={})
    assert sorted(p.name for p in (tmp_path / "case").iterdir()) == ["d__c.nii.gz", "prediction.json"]
    assert not (tmp_path / ".case.old").exists()


def test_names_of_files():
    assert mask_writer.safe_name("amos ct/left kidney (L)") == "amos_ct__left_kidney__L_"
    assert mask_writer.safe_name("../..") == "__.."
    assert "/" not in mask_writer.safe_name("a/b/c")
    assert mask_writer.safe_name("organe/Läsion") == mask_writer.safe_name("organe/La\u0308sion") == "organe__Läsion"
    assert mask_writer.safe_name("器官/肝") == "器官__肝"


def test_names_that_look_alike_get_files_of_their_own(tmp_path):
    grid, like = Grid(np.eye(4), (2, 2, 2)), tmp_path / "scan.mha"
    names = ["d/肝", "d/脾", "d/a b", "d/a(b", "d/A_B", "d/a_b_2"]
    masks = [(name, np.arange(8).reshape(2, 2, 2) == value) for value, name in enumerate(names)]
    files = mask_writer.write_separate(tmp_path / "case", masks, grid, like=like, about={})[:-1]
    assert [f.name for f in files] == [f"d__{n}.nii.gz" for n in ("肝", "脾", "a_b", "a_b_2", "A_B_3", "a_b_2_2")]
    for value, file in enumerate(files):
        assert np.asarray(nib.load(file).dataobj).T.ravel().tolist() == [int(i == value) for i in range(8)]
    assert [t["file"] for t in json.loads((tmp_path / "case" / "prediction.json").read_text())["tasks"]] == [
        f.name for f in files
    ]
