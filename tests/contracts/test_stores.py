"""One suite for every format of shard store: what is written is read, by us and by the plain libraries, to the same bits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_dist.errors import CorruptShardError, DataError, StoreError, TaskError
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.collection import read_collection
from hermes_dist.shards.layout import Layout
from hermes_dist.shards.quantise import error_bound
from hermes_dist.shards.store import ShardStore, create_store, open_store
from hermes_dist.shards.writer import StoreWriter
from hermes_dist.tasks import TaskTable
from hermes_dist.volume.preprocess import Preprocessing

TASKS = TaskTable.build(
    [
        ("ct.abdomen", "CT", "abdomen", [("liver", [1, 2]), ("tumour", [2])], None),
        ("mr brain", "T1", "brain", [("tissue", [300]), ("csf", [7]), ("absent", [9])], 255),
    ]
)
SHAPES = {("ct.abdomen", "a.1"): (70, 33, 131), ("ct.abdomen", "b/2"): (8, 9, 10), ("mr brain", "Ünï"): (40, 64, 65)}
VARIANTS = {
    "zarr64": ("zarr", Layout(64)),
    "zarr32": ("zarr", Layout(32)),
    "bricks": ("webdataset", Layout(48)),
    "margin": ("webdataset", Layout(64, margin_vox=20)),
    "npy": ("webdataset", Layout(40, margin_vox=8, codec="npy")),
}


def make_case(key: tuple[str, str]) -> tuple[CaseRecord, np.ndarray, np.ndarray]:
    dataset, case_id = key
    rng = np.random.default_rng(len(case_id) + SHAPES[key][0])
    image = rng.normal(size=SHAPES[key]).astype(np.float32).clip(-1.5, 4)
    image[: SHAPES[key][0] // 3] = image.min()
    label = np.zeros(SHAPES[key], np.int64)
    z, y, x = (n // 2 for n in SHAPES[key])
    label[z - 3 : z + 2, : y + 1, 1:x] = 300 if dataset == "mr brain" else 1
    label[z, y, x] = 7 if dataset == "mr brain" else 2
    split = "test" if case_id == "b/2" else "train"
    modality = TASKS.dataset(dataset).modality
    record = CaseRecord(
        dataset, case_id, modality, split, (1.5, 1.0, 2.0), '{"placement": 1}', f"hash of {case_id}", {"raw_min": -3.0}
    )
    return record, image, label


def write_all(url: Path | str, variant: str, dtype: str = "int16") -> StoreWriter:
    form, layout = VARIANTS[variant]
    writer = create_store(str(url), form, tasks=TASKS, preprocessing=Preprocessing(image_dtype=dtype), layout=layout)
    for key in reversed(SHAPES):
        writer.write_case(*make_case(key))
    return writer


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardStore]:
    opened: dict[str, ShardStore] = {}
    for variant in VARIANTS:
        url = tmp_path_factory.mktemp(variant)
        write_all(url, variant).finish()
        opened[variant] = open_store(str(url))
    return opened


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(stores: dict[str, ShardStore], variant: str) -> None:
    store = stores[variant]
    assert len(store.manifest) == store.collection.n_cases == 3
    for i in range(3):
        row = store.manifest.row(i)
        _, image, label = make_case((row.dataset, row.case_id))
        got_image, got_label = store.read_case(i)
        assert got_image.dtype == np.float32
        assert got_label.dtype == (np.uint16 if row.dataset == "mr brain" else np.uint8)
        bound = error_bound("int16", row.image_step, float(abs(image).max()))
        assert bound <= 2**-11
        assert abs(got_image - image).max() <= bound
        np.testing.assert_array_equal(got_label, label)
        assert row.air == got_image.min()


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifest_states_the_case(stores: dict[str, ShardStore], variant: str) -> None:
    manifest = stores[variant].manifest
    assert manifest.dataset_names == ("ct.abdomen", "mr brain")
    assert manifest.case_ids == ["a.1", "b/2", "Ünï"]
    assert manifest.rows("ct.abdomen", "train").tolist() == [0]
    assert manifest.rows("ct.abdomen", "test").tolist() == [1]
    assert manifest.rows("mr brain", "val").tolist() == []
    assert manifest.dataset_index.tolist() == [0, 0, 1]
    for i in range(3):
        row = manifest.row(i)
        record, image, label = make_case((row.dataset, row.case_id))
        assert (row.modality, row.split, row.placement, row.content_hash) == (
            record.modality,
            record.split,
            record.placement,
            record.content_hash,
        )
        assert row.shape_vox_zyx == image.shape
        assert row.spacing_mm_zyx == record.spacing_mm_zyx
        assert row.stats["raw_min"] == -3.0
        assert manifest.find(row.dataset, row.case_id) == i
        for k, entry in enumerate(TASKS.dataset(row.dataset).classes):
            voxels = manifest.foreground(i, k)
            inside = np.isin(label, entry.values)
            assert row.class_voxels[k] == inside.sum()
            assert len(voxels) == min(200, inside.sum())
            assert voxels.dtype == np.int32
            assert inside[tuple(voxels.T)].all()
            assert len(np.unique(voxels, axis=0)) == len(voxels)
    assert manifest.find("mr brain", "nobody") is None
    with pytest.raises(StoreError, match="Did you mean 'mr brain'"):
        manifest.rows("mr brian")
    with pytest.raises(StoreError, match="row 3"):
        manifest.row(3)
    with pytest.raises(StoreError, match="class 5"):
        manifest.foreground(0, 5)


boxes = st.tuples(st.tuples(*[st.integers(-40, 140)] * 3), st.tuples(*[st.integers(1, 90)] * 3))


def padded_crop(
    image: np.ndarray, label: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The plain second implementation: index arrays, one axis after another."""
    inside = np.ones(size, bool)
    for axis in range(3):
        index = np.arange(start[axis], start[axis] + size[axis])
        ok = (index >= 0) & (index < image.shape[axis])
        inside &= ok.reshape([-1 if a == axis else 1 for a in range(3)])
    grids = np.ix_(*[np.clip(np.arange(start[a], start[a] + size[a]), 0, image.shape[a] - 1) for a in range(3)])
    return np.where(inside, image[grids], image.min()), np.where(inside, label[grids], 0)


@settings(max_examples=60, deadline=None)
@given(box=boxes, number=st.integers(0, 2))
def test_any_crop_is_the_same_in_every_format(
    stores: dict[str, ShardStore], box: tuple[tuple[int, ...], ...], number: int
) -> None:
    image, label = stores["zarr64"].read_case(number)
    want_image, want_label = padded_crop(image, label, *box)
    for variant, store in stores.items():
        got_image, got_label = store.read_crop(number, *box)
        np.testing.assert_array_equal(got_image, want_image, err_msg=variant)
        np.testing.assert_array_equal(got_label, want_label, err_msg=variant)
        assert got_label.dtype == label.dtype


def test_digest_does_not_depend_on_the_format(stores: dict[str, ShardStore]) -> None:
    assert len({store.collection.digest for store in stores.values()}) == 1
    hashes = [[store.manifest.row(i).data_hash for i in range(3)] for store in stores.values()]
    assert all(h == hashes[0] for h in hashes)


def test_a_patch_up_to_margin_plus_one_lies_in_one_brick(stores: dict[str, ShardStore]) -> None:
    store = stores["margin"]
    for start in np.ndindex(5, 2, 6):
        store.counters.bytes_read = 0
        where = [s * 9 for s in start]
        store.read_crop(0, where, (21, 21, 21))
        row = store.manifest.row(0)
        assert store.counters.bytes_read <= 2 * max(row.block_lengths)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_store_can_be_pickled(stores: dict[str, ShardStore], variant: str) -> None:
    copy = pickle.loads(pickle.dumps(stores[variant]))
    np.testing.assert_array_equal(copy.read_case(0)[0], stores[variant].read_case(0)[0])


@pytest.mark.parametrize("dtype", ["int16", "float16", "float32"])
@pytest.mark.parametrize("variant", ["zarr64", "zarr32"])
def test_plain_zarr_reads_it(tmp_path: Path, variant: str, dtype: str) -> None:
    write_all(tmp_path, variant, dtype).finish()
    store = open_store(str(tmp_path))
    browse = zarr.open_group(str(tmp_path / "zarr"), mode="r")
    assert len(list(browse.groups())) == 2
    for i in range(3):
        row = store.manifest.row(i)
        group = zarr.open_group(str(tmp_path / row.uri), mode="r")
        assert group.attrs["case_id"] == row.case_id
        array = group["image"]
        assert array.dtype == dtype
        assert array.chunks == row.block_vox_zyx
        image, label = store.read_case(i)
        np.testing.assert_array_equal(array[:].astype(np.float32) * np.float32(array.attrs["scale"]), image)
        np.testing.assert_array_equal(group["label"][:], label)
        np.testing.assert_array_equal(array[3:9, 2:8, 1:], store.read_stored(i)[0][3:9, 2:8, 1:])


@pytest.mark.parametrize("variant", ["bricks", "margin", "npy"])
def test_plain_webdataset_reads_it(stores: dict[str, ShardStore], variant: str) -> None:
    from numcodecs import blosc

    store = stores[variant]
    for i in range(3):
        row = store.manifest.row(i)
        image, label = store.read_case(i)
        pipeline = webdataset.WebDataset(str(Path(store.url) / row.uri), shardshuffle=False, empty_check=False)
        seen = np.zeros(image.shape, bool)
        for sample in pipeline if variant != "npy" else pipeline.decode():
            info = sample["json"] if variant == "npy" else json.loads(sample["json"])
            box = tuple(slice(a, a + n) for a, n in zip(info["start_vox_zyx"], info["shape_vox_zyx"], strict=True))
            if variant == "npy":
                brick, mask = sample["image.npy"], sample["label.npy"]
            else:
                brick, mask = (
                    np.frombuffer(blosc.decompress(sample[f"{n}.blosc"]), info[n]["dtype"]).reshape(info["shape_vox_zyx"])
                    for n in ("image", "label")
                )
            np.testing.assert_array_equal(brick * np.float32(info["image"]["scale"]), image[box])
            np.testing.assert_array_equal(mask, label[box])
            assert info["case_id"] == row.case_id
            seen[box] = True
        assert seen.all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_and_increment(tmp_path: Path, variant: str) -> None:
    form, layout = VARIANTS[variant]
    keys = list(SHAPES)

    def writer() -> StoreWriter:
        return create_store(str(tmp_path), form, tasks=TASKS, preprocessing=Preprocessing(image_dtype="int16"), layout=layout)

    first = writer()
    assert first.existing(*keys[0]) is None
    pickle.loads(pickle.dumps(first)).write_case(*make_case(keys[0]))
    with pytest.raises(StoreError, match="no finished shard store"):
        open_store(str(tmp_path))
    resumed = writer()
    assert resumed.existing(*keys[0]) == "hash of a.1"
    resumed.write_case(*make_case(keys[2]))
    before = resumed.finish()
    assert before.n_cases == 2
    assert not list(tmp_path.glob(".staging/rows/*"))

    record, image, label = make_case(keys[0])
    changed = CaseRecord(**{**record.__dict__, "content_hash": "new"})
    reader = open_store(str(tmp_path))
    again = writer()
    assert again.existing(*keys[2]) == "hash of Ünï"
    again.write_case(changed, image + 1, label)
    again.write_case(*make_case(keys[1]))
    np.testing.assert_allclose(reader.read_case(0)[0], image, atol=1e-3)
    after = again.finish()
    assert after.n_cases == 3
    assert after.digest != before.digest == reader.collection.digest
    store = open_store(str(tmp_path))
    np.testing.assert_allclose(store.read_case(0)[0], image + 1, atol=1e-3)
    assert store.manifest.row(0).content_hash == "new"
    uris = {store.manifest.row(i).uri for i in range(3)}
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob(f"{form}/*/*") if p.name != "zarr.json"} == uris
    assert writer().finish() == after
    assert writer().finish(keep={keys[1]}).n_cases == 1
    assert read_collection(str(tmp_path)).n_cases == 1


def test_mistakes_are_named(tmp_path: Path) -> None:
    record, image, label = make_case(("ct.abdomen", "b/2"))
    prep = Preprocessing(image_dtype="int16")
    with pytest.raises(StoreError, match=r"'zar' is not one of .* Did you mean 'zarr'"):
        create_store(str(tmp_path), "zar", tasks=TASKS, preprocessing=prep)
    with pytest.raises(StoreError, match="32, 40, 48, 56 or 64"):
        create_store(str(tmp_path), "zarr", tasks=TASKS, preprocessing=prep, layout=Layout(128))
    with pytest.raises(StoreError, match="smaller margin"):
        create_store(str(tmp_path), "webdataset", tasks=TASKS, preprocessing=prep, layout=Layout(64, margin_vox=64))
    writer = create_store(str(tmp_path), "zarr", tasks=TASKS, preprocessing=prep)
    with pytest.raises(StoreError, match="no case was converted"):
        writer.finish()
    with pytest.raises(DataError, match="same 3D shape"):
        writer.write_case(record, image, label[1:])
    with pytest.raises(DataError, match="NaN"):
        writer.write_case(record, np.where(image > 1, np.nan, image), label)
    with pytest.raises(DataError, match="whole numbers"):
        writer.write_case(record, image, label - 1)
    with pytest.raises(DataError, match="whole numbers"):
        writer.write_case(record, image, label.astype(np.float32))
    with pytest.raises(TaskError, match="nothing"):
        writer.write_case(CaseRecord(**{**record.__dict__, "dataset": "nothing"}), image, label)
    writer.write_case(record, image, label)
    writer.finish()
    with pytest.raises(StoreError, match="convert to another URL"):
        create_store(str(tmp_path), "webdataset", tasks=TASKS, preprocessing=prep)
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError, match="three positive sides"):
        store.read_crop(0, (0, 0, 0), (4, 0, 4))
    path = tmp_path / "collection.json"
    good = path.read_text()
    path.write_text(good.replace('"version": 1', '"version": 99'))
    with pytest.raises(StoreError, match="format version 99"):
        open_store(str(tmp_path))
    path.write_text(good[:100])
    with pytest.raises(CorruptShardError, match="no JSON"):
        open_store(str(tmp_path))
