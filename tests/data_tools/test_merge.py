"""Conversion in parts: `merge` publishes what all parts of one conversion have done, and nothing of another."""

from __future__ import annotations

import pytest

from data_tools.convert import in_part, merge
from data_tools.journal import Journal
from data_tools.one_writer import one_writer
from hermes_dist.errors import StoreError, UsageError
from hermes_dist.shards.store import open_store
from hermes_dist.shards.verify import case_problems
from hermes_dist.shards.writer import StoreWriter
from tests.data_tools.conversion import run


def spacings(out):
    store = open_store(str(out))
    rows = [store.manifest.row(i) for i in range(len(store.manifest))]
    assert [p for row in rows for p in case_problems(store, row)] == []
    return {row.case_id: round(row.spacing_mm_zyx[0], 3) for row in rows}


def damage(nnunet, case_id):
    """Make a case unreadable; returns the file and its bytes."""
    file = nnunet / "imagesTr" / f"{case_id}_0000.nii.gz"
    good = file.read_bytes()
    file.write_bytes(good[:300])
    return file, good


def parts_of(case_id, n=2):
    """(the part that holds a case, another part)."""
    mine = next(i for i in range(1, n + 1) if in_part(("Toy", case_id), (i, n)))
    return (mine, n), (mine % n + 1, n)


def test_outcomes_of_an_earlier_conversion_are_no_parts_of_this_one(nnunet, tmp_path):
    """Half of the cases stayed at 1.5 mm under a collection.json that said 2 mm."""
    out = tmp_path / "store"
    run(nnunet, out, spacing=1.5)
    mine, other = parts_of("case_0")
    run(nnunet, out, spacing=2.0, part=mine)
    left = sorted(f"Toy/case_{i}" for i in range(4) if in_part(("Toy", f"case_{i}"), other))
    assert left
    with pytest.raises(StoreError, match=f"{len(left)} cases were not converted yet.*{left[0]}"):
        merge(str(out))
    assert set(spacings(out).values()) == {1.5}
    run(nnunet, out, spacing=2.0, part=other)
    assert merge(str(out)).collection.n_cases == 4
    assert set(spacings(out).values()) == {2.0}


def test_a_part_with_other_parameters_is_refused(nnunet, tmp_path):
    """The last plan won, and cases of both spacings were published."""
    out = tmp_path / "store"
    mine, other = parts_of("case_0")
    run(nnunet, out, spacing=2.0, part=mine)
    with pytest.raises(StoreError, match=r"spacing_mm_zyx \[2.0, 2.0, 2.0\] there, \[1.5, 1.5, 1.5\] here.*plan.json"):
        run(nnunet, out, spacing=1.5, part=other)
    with pytest.raises(StoreError, match="were not converted yet"):
        merge(str(out))
    (out / ".staging" / "plan.json").unlink()
    run(nnunet, out, spacing=1.5, part=other)
    with pytest.raises(StoreError, match="Toy/case_0"):
        merge(str(out))
    run(nnunet, out, spacing=1.5, part=mine)
    merge(str(out))
    assert set(spacings(out).values()) == {1.5}


def test_a_part_with_other_cases_is_refused(nnunet, tmp_path):
    mine, other = parts_of("case_0")
    run(nnunet, tmp_path / "store", part=mine)
    (nnunet / "imagesTr" / "case_3_0000.nii.gz").unlink()
    (nnunet / "labelsTr" / "case_3.nii.gz").unlink()
    with pytest.raises(StoreError, match=r"Toy/case_3 \(\w+ there, absent here\)"):
        run(nnunet, tmp_path / "store", part=other)


def test_a_case_that_is_still_being_written_is_missing(nnunet, tmp_path):
    """Its outcome is written first; publishing now would delete its files under the writer's hands."""
    out = tmp_path / "store"
    for i in (1, 2):
        run(nnunet, out, part=(i, 2))
    row = out / ".staging" / "rows" / "Toy" / "case_2.json"
    data = row.read_bytes()
    row.unlink()
    with pytest.raises(StoreError, match=r"1 cases were not converted yet.*Toy/case_2"):
        merge(str(out))
    row.write_bytes(data)
    assert merge(str(out)).collection.n_cases == 4


def test_unchanged_cases_count_for_their_part(nnunet, tmp_path):
    out = tmp_path / "store"
    first = run(nnunet, out)
    for i in (1, 2):
        assert set(run(nnunet, out, part=(i, 2)).counts) == {"unchanged"}
    report = merge(str(out))
    assert report.counts == {"unchanged": 4}
    assert report.collection == first.collection
    assert all(o.image_hash for o in Journal(str(out)).history().values())


def test_outcomes_that_a_killed_clean_up_left_do_not_count(nnunet, tmp_path):
    out = tmp_path / "store"
    for i in (1, 2):
        run(nnunet, out, part=(i, 2))
    left = {p: p.read_bytes() for p in (out / ".staging" / "outcomes").rglob("*.json")}
    merge(str(out))
    for path, data in left.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    mine, _ = parts_of("case_0")
    run(nnunet, out, part=mine)
    left = [f"case_{i}" for i in range(4) if not in_part(("Toy", f"case_{i}"), mine)]
    with pytest.raises(StoreError, match=f"{len(left)} cases were not converted yet.*Toy/{left[0]}"):
        merge(str(out))


def test_a_part_notices_that_its_plan_is_gone(nnunet, tmp_path, monkeypatch):
    out = tmp_path / "store"
    write = StoreWriter.write_case

    def meddle(self, *arguments):
        (out / ".staging" / "plan.json").unlink(missing_ok=True)
        return write(self, *arguments)

    monkeypatch.setattr(StoreWriter, "write_case", meddle)
    with pytest.raises(StoreError, match="started or published there while this part ran"):
        run(nnunet, out, part=parts_of("case_0")[0])


def test_a_case_that_was_unreadable_for_a_moment_comes_back_in_parts(nnunet, tmp_path):
    """Its old rejection stood, and `merge` deleted the published case."""
    out = tmp_path / "store"
    run(nnunet, out)
    mine, other = parts_of("case_1")
    file, good = damage(nnunet, "case_1")
    assert run(nnunet, out, part=mine).counts["rejected"] == 1
    file.write_bytes(good)
    assert set(run(nnunet, out, part=mine).counts) == {"unchanged"}
    run(nnunet, out, part=other)
    assert merge(str(out)).collection.n_cases == 4
    assert Journal(str(out)).history()["Toy", "case_1"].image_hash


@pytest.mark.parametrize("remembered", [True, False])
def test_a_case_that_was_unreadable_for_a_moment_keeps_what_was_found(remembered, nnunet, tmp_path, monkeypatch, raw):
    """Its image hash and findings were gone for good, so that copies of it were no longer noticed."""
    out = tmp_path / "store"
    _, label, affine = raw.make_volume(1)
    raw.save(nnunet / "labelsTr" / "case_1.nii.gz", label * 0, affine)
    run(nnunet, out)
    before = Journal(str(out)).history()["Toy", "case_1"]
    assert [f.check for f in before.findings] == ["empty label"]
    file, good = damage(nnunet, "case_1")
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(nnunet, out)
    assert Journal(str(out)).staged()["Toy", "case_1"].status == "rejected"
    file.write_bytes(good)
    if not remembered:
        (out / "conversion.jsonl").unlink()
    assert run(nnunet, out).counts == {"unchanged": 4}
    after = Journal(str(out)).history()["Toy", "case_1"]
    assert (after.image_hash, after.findings) == (before.image_hash, before.findings)


def test_parameters_that_go_there_and_back_lose_nothing(nnunet, tmp_path, monkeypatch):
    """A staged row named the published files, and what superseded it deleted them."""
    out = tmp_path / "store"
    run(nnunet, out, spacing=1.5)
    for spacing in (2.0, 1.5, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(nnunet, out, spacing=spacing)
        assert set(spacings(out).values()) == {1.5}
    run(nnunet, out, spacing=2.0)
    assert set(spacings(out).values()) == {2.0}


def test_one_conversion_at_a_time_writes_a_store(nnunet, tmp_path):
    """What ended first deleted what the other had not published yet. Parts of one conversion may run together."""
    out = tmp_path / "store"
    with one_writer(str(out)):
        for part in (None, (1, 2)):
            with pytest.raises(UsageError, match="another conversion is writing this store"):
                run(nnunet, out, part=part)
        with pytest.raises(UsageError, match="another conversion is writing this store"):
            merge(str(out))
    assert not out.exists(), "nothing was written, so nothing is left"
    with one_writer(str(out), part=True):
        run(nnunet, out, part=(1, 2))
        run(nnunet, out, part=(2, 2))
        with pytest.raises(UsageError, match="another conversion is writing this store"):
            merge(str(out))
    merge(str(out))
    assert len(spacings(out)) > 1
