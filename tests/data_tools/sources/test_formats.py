"""File formats: agreement with nibabel and SimpleITK, and a verdict on every damage."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_tools.findings import RejectedError
from data_tools.sources.inflate import file_digest
from data_tools.sources.nifti import read_nifti, write_nifti
from data_tools.sources.raw import CaseRef
from data_tools.sources.volumes import READERS, fingerprint_files, is_volume, measure_case, read_volume
from hermes_dist.volume.geometry import Grid


def itk_image(dtype=np.int16):
    image = np.random.default_rng(0).integers(0, 200, (12, 16, 14))
    result = sitk.GetImageFromArray(image.astype(dtype))
    result.SetSpacing((0.7, 1.3, 2.9))
    result.SetOrigin((-12.5, 40.0, 7.25))
    result.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    return result, image.astype(dtype)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_agrees_with_simpleitk(name, compress, dtype, tmp_path):
    image, array = itk_image(dtype=dtype)
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compress)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.values(), array)
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.grid.affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-5)
    case = CaseRef("a", (tmp_path / name,), ((tmp_path / name, None),))
    assert fingerprint_files(case) == fingerprint_files(case)
    assert volume.digest.startswith(file_digest(tmp_path / name))


def test_every_real_file_agrees_with_simpleitk(real_data):
    files = [p for p in sorted(real_data.rglob("*")) if is_volume(p)]
    assert len(files) > 700
    for path in files[::25] + [p for p in files if not p.name.endswith(".nii.gz")]:
        volume, reference = read_volume(path), sitk.ReadImage(str(path))
        expected = sitk.GetArrayFromImage(reference)
        np.testing.assert_allclose(volume.values(), expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(volume.grid.spacing_mm_zyx, reference.GetSpacing()[::-1], rtol=1e-5)


def test_scaling_nan_slope_and_big_endian(tmp_path, raw):
    image, _, affine = raw.make_volume()
    path = raw.save(tmp_path / "a.nii", image, affine)
    data = bytearray(path.read_bytes())
    data[112:120] = struct.pack("<ff", 0.5, -3)
    path.write_bytes(data)
    np.testing.assert_allclose(read_nifti(path).values(), image * 0.5 - 3)
    data[112:120] = struct.pack("<ff", float("nan"), 0)
    path.write_bytes(data)
    assert read_nifti(path).values().dtype == np.int16
    nib.save(nib.Nifti1Image(image.T, affine, nib.Nifti1Header(endianness=">")), tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").values(), image)


def test_units_and_forms(tmp_path, raw):
    image, _, affine = raw.make_volume()
    scan = nib.Nifti1Image(image.T, np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine)
    scan.header.set_xyzt_units("meter")
    scan.set_sform(scan.affine, 1)
    nib.save(scan, tmp_path / "metres.nii.gz")
    volume = read_nifti(tmp_path / "metres.nii.gz")
    np.testing.assert_allclose(volume.grid.affine, affine, atol=1e-4)
    scan = nib.Nifti1Image(image.T, affine)
    scan.set_sform(affine, 1)
    other = affine.copy()
    other[0, 3] += 30
    scan.set_qform(other, 1)
    nib.save(scan, tmp_path / "two.nii.gz")
    volume = read_nifti(tmp_path / "two.nii.gz")
    np.testing.assert_allclose(volume.grid.affine, affine, atol=1e-4)
    assert [f.check for f in volume.findings] == ["form"]
    scan.set_sform(None, 0)
    scan.set_qform(None, 0)
    nib.save(scan, tmp_path / "none.nii.gz")
    volume = read_nifti(tmp_path / "none.nii.gz")
    assert [f.severity for f in volume.findings] == ["warn"]
    assert "x taken as right-to-left" in volume.findings[0].message
    np.testing.assert_allclose(volume.grid.affine, nib.load(tmp_path / "none.nii.gz").affine, atol=1e-6)
    assert np.diag(volume.grid.affine)[0] < 0
    scan = nib.Nifti1Image(image.T, np.diag([1e-3, 1e-3, 2e-3, 1]))
    scan.header.set_xyzt_units("meter")
    scan.set_sform(None, 0)
    scan.set_qform(None, 0)
    nib.save(scan, tmp_path / "metres.nii.gz")
    np.testing.assert_allclose(np.diag(read_nifti(tmp_path / "metres.nii.gz").grid.affine), [-1, 1, 2, 1], atol=1e-5)


def test_several_gzip_members_and_padding(tmp_path, raw):
    image, _, affine = raw.make_volume()
    data = raw.save(tmp_path / "a.nii", image, affine).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 64)
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz").values(), image)


def test_written_files_are_reproducible_and_exact(tmp_path, raw):
    image, _, affine = raw.make_volume()
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, image, Grid(affine, image.shape))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    volume = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(volume.dataobj).T, image)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def damage(kind, raw):
    """Bytes of a damaged `.nii.gz`."""
    plain = gzip.decompress(raw)
    forged = bytearray(plain)
    if kind == "crc":
        return raw[:-8] + bytes(b ^ 0xFF for b in raw[-8:-4]) + raw[-4:]
    if kind == "flipped":
        return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 0x10]) + raw[len(raw) // 2 + 1 :]
    if kind == "cut":
        return raw[: len(raw) // 2]
    if kind == "short":
        return gzip.compress(plain[:-100])
    if kind == "empty":
        return b""
    if kind == "text":
        return b"<html>404</html>" * 50
    if kind == "bomb":
        return gzip.compress(plain + b"\0" * (4 << 20))
    if kind == "huge":
        forged[40:56] = struct.pack("<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    if kind == "negative":
        forged[40:56] = struct.pack("<8h", 3, -5, 16, 12, 1, 1, 1, 1)
    if kind == "complex":
        forged[70:74] = struct.pack("<hh", 32, 64)
    if kind == "nan affine":
        forged[280:296] = struct.pack("<4f", float("nan"), 0, 0, 0)
        forged[252:254] = struct.pack("<h", 0)
    return gzip.compress(bytes(forged))


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("crc", "gzip"),
        ("flipped", None),
        ("cut", "truncated"),
        ("short", "truncated"),
        ("empty", "truncated"),
        ("text", "header"),
        ("bomb", "surplus"),
        ("huge", "truncated"),
        ("negative", "dimensions"),
        ("complex", "type"),
        ("nan affine", "geometry"),
    ],
)
def test_damage_is_named(kind, check, tmp_path, raw):
    image, _, affine = raw.make_volume()
    path = raw.save(tmp_path / "a.nii.gz", image, affine)
    path.write_bytes(damage(kind, path.read_bytes()))
    with pytest.raises(RejectedError) as caught:
        read_nifti(path)
    assert check is None or caught.value.finding.check == check
    assert str(path) in str(caught.value)
    assert caught.value.finding.suggestion


def test_a_header_reads_no_file_outside_its_folder(tmp_path):
    (tmp_path / "secret.raw").write_bytes(b"\0" * 8)
    (tmp_path / "in").mkdir()
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = ../secret.raw\n"
    (tmp_path / "in" / "a.mhd").write_text(header)
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: ../secret.raw\n\n"
    (tmp_path / "in" / "a.nhdr").write_text(nrrd)
    for name in ("a.mhd", "a.nhdr"):
        with pytest.raises(RejectedError, match="own folder"):
            read_volume(tmp_path / "in" / name)


def test_a_changed_data_file_changes_the_fingerprint(tmp_path):
    image, _ = itk_image()
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    case = CaseRef("a", (tmp_path / "a.mhd",), ((tmp_path / "a.mhd", None),))
    before = fingerprint_files(case)
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"\1" + raw.read_bytes()[1:])
    assert fingerprint_files(case) != before


def mutate(data, rng, number):
    """A few bytes changed (in every third mutant of the header), every fifth cut short, every seventh with surplus."""
    data = bytearray(data)
    area = len(data) if number % 3 else min(len(data), 400)
    for place in rng.integers(0, area, rng.integers(1, 6)):
        data[place] = rng.integers(0, 256)
    if number % 5 == 0:
        data = data[: rng.integers(0, len(data))]
    return data + bytes(rng.integers(0, 256, 50, dtype=np.uint8)) if number % 7 == 0 else data


def read_mutants(suffix, count, folder):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 200, (6, 8, 7)).astype(np.uint8))
    source, mutant = folder / ("a" + suffix), folder / ("m" + suffix)
    sitk.WriteImage(image, str(source), useCompression=True)
    original = source.read_bytes()
    rng = np.random.default_rng(list(suffix.encode()))
    rejected = 0
    for number in range(count):
        mutant.write_bytes(mutate(original, rng, number))
        try:
            read_volume(mutant)
        except RejectedError:
            rejected += 1
    return rejected


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_mutated_files_give_a_value_or_a_verdict(suffix, tmp_path):
    assert read_mutants(suffix, 40, tmp_path) > 4


@pytest.mark.slow
@pytest.mark.parametrize("suffix", sorted(READERS))
def test_two_thousand_mutated_files(suffix, tmp_path):
    """286 mutants per ending, 2,002 in all."""
    assert read_mutants(suffix, 286, tmp_path) > 40


def write_raw(folder, suffix, skip, voxels, **more):
    """A header whose voxels lie behind something else, in a file beside it or in its own."""
    lists = voxels.ndim == 4
    sizes = " ".join(str(s) for s in reversed(voxels.shape))
    data = "" if suffix in (".mha", ".nrrd") else "a.raw"
    if suffix.startswith(".m"):
        text = f"NDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\n{skip}\nElementDataFile = {data or 'LOCAL'}\n"
    else:
        directions = ("none " if lists else "") + "(1,0,0) (0,1,0) (0,0,2)"
        text = f"NRRD0004\ntype: short\ndimension: {voxels.ndim}\nsizes: {sizes}\nencoding: {more.get('encoding', 'raw')}\n"
        text += f"endian: little\nspace: lps\nspace directions: {directions}\n{skip}\n"
        text += f"data file: {data}\n\n" if data else "\n"
    content = more.get("before", b"") + voxels.astype("<i2").tobytes() + more.get("after", b"")
    path = folder / ("a" + suffix)
    path.write_bytes(text.encode() + (b"" if data else content))
    (folder / "a.raw").write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("suffix", "skip"),
    [
        (".mhd", "HeaderSize = 12"), (".mhd", "HeaderSize = -1"), (".mha", "HeaderSize = -1"),
        *((s, f"byte skip: {n}") for s in (".nhdr", ".nrrd") for n in (12, -1)),
        *((s, k) for s in (".nhdr", ".nrrd") for k in ("line skip: 2", "line skip: 1\nbyte skip: 6")),
    ],
)  # fmt: skip
def test_what_lies_before_the_voxels_is_skipped(suffix, skip, tmp_path):
    voxels = np.random.default_rng(0).integers(-900, 400, (3, 4, 5))
    path = write_raw(tmp_path, suffix, skip, voxels, before=b"one..\ntwo..\n")
    np.testing.assert_array_equal(read_volume(path).array, voxels)


@pytest.mark.parametrize(
    ("suffix", "skip", "more"),
    [
        (".mhd", "Comment = x", {"after": bytes(12)}),
        (".nhdr", "content: x", {"after": bytes(12)}),
        (".mhd", "HeaderSize = -2", {}),
        (".mhd", "HeaderSize = 9999", {}),
        (".mhd", "HeaderSize = 12\nCompressedData = True", {}),
        (".nhdr", "byte skip: -2", {}),
        (".nhdr", "byte skip: 9999", {}),
        (".nhdr", "byte skip: 12", {"encoding": "gzip"}),
    ],
)
def test_voxels_that_may_be_shifted_are_rejected(suffix, skip, more, tmp_path):
    path = write_raw(tmp_path, suffix, skip, np.zeros((3, 4, 5)), **more)
    with pytest.raises(RejectedError, match=r"skip|HeaderSize|more than the header"):
        read_volume(path)


def test_positions_of_nrrd_in_other_units_are_rejected(tmp_path):
    voxels = np.zeros((3, 4, 5))
    assert read_volume(write_raw(tmp_path, ".nrrd", 'space units: "mm" "mm" "mm"', voxels)).grid.shape_vox_zyx == (3, 4, 5)
    for units in ('space units: "m" "m" "m"', 'units: "" "cm" "cm"'):
        with pytest.raises(RejectedError, match=r"expected mm"):
            read_volume(write_raw(tmp_path, ".nrrd", units, voxels))


def test_a_leading_list_axis_of_nrrd_holds_channels(tmp_path):
    channels = np.random.default_rng(0).integers(-900, 400, (2, 3, 4, 5))
    volume = read_volume(write_raw(tmp_path, ".nrrd", "kinds: list domain domain domain", np.moveaxis(channels, 0, -1)))
    np.testing.assert_array_equal(volume.array, channels)
    assert volume.grid.shape_vox_zyx == (3, 4, 5)


def test_channels_and_frames_count_for_memory(tmp_path):
    """The reader holds all of them before it picks one."""
    frames = np.zeros((12, 11, 10, 5), np.int16)
    nib.save(nib.Nifti1Image(frames, np.eye(4)), tmp_path / "a.nii.gz")
    text = (
        "NRRD0004\ntype: short\ndimension: 4\nspace: left-posterior-superior\nsizes: 5 12 11 10\nencoding: raw\nendian: little\n"
    )
    directions = "space directions: none (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n"
    (tmp_path / "a.nrrd").write_bytes((text + directions).encode() + frames.tobytes())
    for name in ("a.nii.gz", "a.nrrd"):
        grid, n_bytes = measure_case(CaseRef("a", (tmp_path / name,), ()))
        assert grid.shape_vox_zyx == (10, 11, 12)
        assert n_bytes == read_volume(tmp_path / name).array.nbytes == frames.nbytes
