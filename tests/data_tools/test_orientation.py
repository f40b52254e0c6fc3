"""The same scan in other axes, at another place, in another file format: the stored volume is the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_tools.integrity import Expected
from data_tools.jobs import Job, Target, run_job
from data_tools.sources.raw import CaseRef
from hermes_dist.volume.geometry import Grid, Orientation
from hermes_dist.volume.preprocess import Preprocessing

turns = st.builds(Orientation, st.permutations(range(3)).map(tuple), st.tuples(*[st.booleans()] * 3))
SUFFIXES = [".nii.gz", ".nii", ".nrrd", ".mha"]


class Memory:
    """A writer and a log that keep what they are given."""

    def existing(self, dataset, case_id):
        return None

    def write_case(self, record, image_zyx, label_zyx):
        self.record, self.image, self.label = record, image_zyx, label_zyx
        self.row, self.file_bytes = self, [0]
        return self

    def write(self, outcome):
        self.findings = outcome.findings


def write(path, array_zyx, grid):
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array_zyx.T), grid.affine), path)
        return
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_zyx))
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0)
    lps = np.diag([-1, -1, 1]) @ grid.affine[:3]
    image.SetSpacing(spacing)
    image.SetDirection((lps[:, :3] / spacing).ravel())
    image.SetOrigin(lps[:, 3])
    sitk.WriteImage(image, str(path), useCompression=True)


def stored(image, label, grid, suffix, modality, params):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name + suffix) for name in ("image", "label")]
        write(paths[0], image, grid)
        write(paths[1], label, grid)
        case = CaseRef("a", (paths[0],), ((paths[1], None),))
        memory = Memory()
        job = Job("toy", "folder", case, modality, "train", Expected((("x", (1,)), ("y", (2,))), frozenset({1, 2}), None), params)
        outcome = run_job(job, Target(memory, memory))
        assert outcome.status == "converted", outcome.findings
    return memory


@settings(max_examples=25, deadline=None)
@given(
    turns,
    st.tuples(*[st.floats(0.6, 4)] * 3),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.floats(-25, 25),
    st.tuples(*[st.sampled_from(SUFFIXES)] * 2),
    st.sampled_from(["CT", "T1"]),
    st.sampled_from(["linear", "cubic"]),
)
def test_a_transformed_copy_gives_the_same_stored_volume(turn, spacing, offset, angle_deg, suffixes, modality, interpolation):
    rng = np.random.default_rng(0)
    image = np.full((11, 14, 16), -1000, np.int16)
    image[1:-1, 2:-2, 2:-3] = rng.integers(-100, 300, (9, 10, 11))
    label = np.zeros(image.shape, np.uint8)
    label[2:7, 4:9, 5:12], label[4:6, 5:8, 6:9] = 1, 2
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zyx", (angle_deg, angle_deg / 2, -angle_deg), degrees=True).as_matrix() * spacing
    grid = Grid(affine, image.shape)
    params = Preprocessing(interpolation=interpolation, body_margin_mm=3)
    one = stored(image, label, grid, suffixes[0], modality, params)
    moved = turn.apply_to_grid(grid)
    elsewhere = moved.affine.copy()
    elsewhere[:3, 3] += offset
    other = stored(turn.apply(image), turn.apply(label), Grid(elsewhere, moved.shape_vox_zyx), suffixes[1], modality, params)
    np.testing.assert_allclose(one.image, other.image, atol=2e-4)
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_allclose(one.record.spacing_mm_zyx, other.record.spacing_mm_zyx, rtol=1e-5)
