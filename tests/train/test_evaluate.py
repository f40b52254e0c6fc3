"""Evaluation of whole scans: right numbers for known answers, honest handling of what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from hermes_dist.config import EvaluateConfig
from hermes_dist.errors import CorruptShardError, TaskError, TransientStorageError, UsageError
from hermes_dist.tasks import TaskTable
from hermes_dist.train import evaluate as ev
from hermes_dist.train.evaluate_queue import WorkQueue
from hermes_dist.train.evaluate_slices import read_slice, save_slice, telling_plane
from tests.train.tiny_run import TASKS, Oracle, label_of, make_config, make_store


@pytest.fixture
def job(tmp_path: Path) -> ev.Job:
    config = make_config(tmp_path)
    return ev.Job(config.run_dir, config, [make_store(tmp_path / "store")], TASKS, "test", "0123")


def test_a_perfect_model_scores_one_everywhere(job):
    result = ev.evaluate(Oracle(TASKS).eval(), job)
    assert result is not None
    assert result["mean"]["dice"] == result["mean"]["nsd"] == 1.0
    assert result["mean"]["hd95_mm"] == 0.0
    assert [(c["dataset"], c["task"], c["n"], c["n_with_reference"]) for c in result["per_class"]] == [
        ("organs", "liver", 2, 2),
        ("organs", "tumour", 2, 1),
        ("brains", "stem", 2, 2),
        ("brains", "liver", 2, 2),
    ]
    assert result["failed"] == []


def test_the_file_is_written_with_its_policy(job):
    ev.evaluate(Oracle(TASKS).eval(), job)
    written = json.loads((job.run_dir / "evaluation" / "test.json").read_text())
    assert set(written["mean"]) >= {"dice", "nsd", "hd95_mm", "dice_ci"}
    assert set(written["per_class"][0]) >= {"dataset", "task", "n", "dice", "dice_ci"}
    assert written["policy"]["empty_reference"] == "count"
    assert written["policy"]["cases_by_grid"] == {"original": 0, "stored": 4}
    assert written["policy"]["window_vox_zyx"] == [16, 16, 16]
    assert not [p for p in (job.run_dir / "evaluation").iterdir() if p.name.startswith(".")]


def test_a_shifted_model_is_measured_in_mm(job):
    """Masks two voxels too far along x, 3 mm: independent arithmetic on the label gives the same Dice."""
    result = ev.evaluate(Oracle(TASKS, shift=2).eval(), job)
    assert result is not None
    stem = next(c for c in result["cases"] if (c["case_id"], c["class"]) == ("b0", "stem"))
    reference = label_of(0) == 1
    assert stem["hd95_mm"] == pytest.approx(3.0)
    assert 0 < stem["dice"] < 1
    assert stem["reference_vox"] == reference.sum()
    assert stem["nsd"] < 1


def test_missed_and_false_structures_are_counted(job):
    class Wrong(Oracle):
        """Never sees `organs/tumour`, and sees `brains/liver` everywhere."""

        def forward(self, image, task_ids, modality_ids):
            output = super().forward(image, task_ids, modality_ids)
            for column, task in enumerate(task_ids[0].tolist()):
                if task == 1:
                    output.mask_logits[:, column] = -10
                if task == 3:
                    output.mask_logits[:, column] = 10
            return output

    result = ev.evaluate(Wrong(TASKS).eval(), job)
    assert result is not None
    tumour = result["per_class"][1]
    assert (tumour["missed"], tumour["dice"], tumour["n"]) == (1, 0.5, 2)  # a1 has none, and none was predicted
    assert tumour["dice_by_policy"] == {"count": 0.5, "nnunet": 0.0, "skip": 0.0}
    assert tumour["hd95_mm"] == pytest.approx(1.5 * np.linalg.norm([20, 18, 16]) / 2, abs=1e-3)


def test_unannotated_voxels_do_not_count(job):
    class Everywhere(Oracle):
        def forward(self, image, task_ids, modality_ids):
            output = super().forward(image, task_ids, modality_ids)
            output.mask_logits[(image.abs() - 9).abs().expand_as(output.mask_logits) < 0.5] = 10
            return output

    result = ev.evaluate(Everywhere(TASKS).eval(), job)
    assert result is not None
    assert result["mean"]["dice"] == 1.0


def test_raw_references_are_scored_on_the_original_grid(job):
    raw = {("organs", "a0"): np.flip(label_of(0), 2)}
    job = ev.Job(job.run_dir, job.config, job.stores, TASKS, "test", "x", lambda row: raw.get((row.dataset, row.case_id)))
    result = ev.evaluate(Oracle(TASKS).eval(), job)
    assert result is not None
    assert result["policy"]["cases_by_grid"] == {"original": 1, "stored": 3}
    assert result["mean"]["dice"] == 1.0


@pytest.mark.parametrize("change", ["grid", "references", "policy", "weights"])
def test_an_interrupted_evaluation_goes_on_only_as_the_same_one(job, change):
    """Results that are left from another grid, policy or model are not taken over; those of the same evaluation are."""
    perfect = {"scores": [s.to_json() for s in ev.score_scan(Oracle(TASKS).eval(), job, ev.find_cases(job)[0])]}
    queue = WorkQueue(job.out_dir / f".work-test-{job.fingerprint}", 4)
    queue.prepare()
    (queue.folder / "000000.json").write_text(json.dumps(perfect))
    changed = {
        "grid": replace(job, references=lambda row: None),
        "references": replace(job, references_digest="of another collection"),
        "policy": replace(job, config=job.config.model_copy(update={"evaluate": EvaluateConfig(overlap=0.25)})),
        "weights": replace(job, weights_digest="4567"),
    }[change]
    wrong = Oracle(TASKS, shift=2).eval()
    case = ev.find_cases(job)[0].row.case_id

    def dice(of: ev.Job) -> float:
        return min(c["dice"] for c in ev.evaluate(wrong, of)["cases"] if c["case_id"] == case)

    assert dice(changed) < 1
    assert dice(job) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CorruptShardError("zarr/organs/a1: checksum does not match"), "zarr/organs/a1: checksum does not match"),
        (MemoryError("Unable to allocate 40.0 GiB"), "organs/a1: not enough memory (Unable to allocate 40.0 GiB)"),
    ],
)
def test_a_case_that_fails_is_listed_and_the_others_go_on(job, monkeypatch, error, reason):
    store = job.stores[0]
    read = store.read_case

    def broken(row):
        if row.case_id == "a1":
            raise error
        return read(row)

    monkeypatch.setattr(store, "read_case", broken)
    result = ev.evaluate(Oracle(TASKS).eval(), job)
    assert result is not None
    assert [(f["dataset"], f["case_id"]) for f in result["failed"]] == [("organs", "a1")]
    assert result["failed"][0]["reason"].split(";")[0] == reason
    assert result["mean"]["n_cases"] == 3


def test_what_failed_before_an_interruption_is_tried_again(job, monkeypatch):
    """The storage may answer now, the device may have more memory: a failure says nothing about the next start."""
    failing, plain = [True], ev.score_scan

    def interrupted(model, of, case):
        if not failing[0]:
            return plain(model, of, case)
        if case.row.case_id == "a1":
            raise KeyboardInterrupt
        raise CorruptShardError("a bad moment")

    monkeypatch.setattr(ev, "score_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(Oracle(TASKS).eval(), job)
    failing[0] = False
    result = ev.evaluate(Oracle(TASKS).eval(), job)
    assert result is not None
    assert (result["failed"], result["mean"]["n_cases"]) == ([], 4)


def test_every_case_has_a_picture_of_its_own_whatever_its_name(tmp_path):
    mask, image = np.ones((2, 4, 4), bool), np.zeros((2, 4, 4), np.float32)
    cases = ["d/a 0", "d/a(0", "d/患者甲", "d/患者乙"]
    files = [save_slice(tmp_path, case, image, [("liver", mask, mask)], (1.5, 1.5, 1.5)) for case in cases]
    assert [read_slice(file).case for file in files] == cases


def test_storage_that_fails_for_a_moment_costs_no_case(job, monkeypatch):
    """Or the mean over the others would be compared with earlier ones, and the wrong checkpoint kept as the best."""
    read, failures = job.stores[0].read_case, [TransientStorageError("503 SlowDown")] * 2

    def throttled(row):
        if failures:
            raise failures.pop()
        return read(row)

    monkeypatch.setattr(job.stores[0], "read_case", throttled)
    monkeypatch.setattr("hermes_dist.shards.retry.time.sleep", lambda _: None)
    result = ev.evaluate(Oracle(TASKS).eval(), job)
    assert result is not None
    assert (result["failed"], failures, result["mean"]["dice"]) == ([], [], 1.0)


def test_nan_logits_fail_that_case_only(job):
    class Nan(Oracle):
        def forward(self, image, task_ids, modality_ids):
            output = super().forward(image, task_ids, modality_ids)
            if int(task_ids[0, 0]) == 2:
                output.mask_logits[0, 0, 0, 0, 0] = float("nan")
            return output

    result = ev.evaluate(Nan(TASKS).eval(), job)
    assert result is not None
    assert [f["case_id"] for f in result["failed"]] == ["b0", "b2"]


def test_an_empty_split_is_a_usage_error(job):
    with pytest.raises(UsageError, match="split 'tset'.*Did you mean 'test'"):
        ev.evaluate(Oracle(TASKS), ev.Job(job.run_dir, job.config, job.stores, TASKS, "tset", "x"))


def test_stores_of_other_datasets_or_classes_are_refused(job):
    swapped = TaskTable.build([("organs", "CT", "x", [("tumour", [7]), ("liver", [8])], None)])
    dataset = ev.as_trained(swapped.datasets[0], TASKS)
    assert [(c.name, c.task_id, c.values) for c in dataset.classes] == [("liver", 0, (8,)), ("tumour", 1, (7,))]
    for classes, name in (([("liver", [1])], "organs"), ([("liver", [1])], "organz")):
        other = TaskTable.build([(name, "CT", "x", classes, None)])
        with pytest.raises(TaskError, match="trained on|not in this collection"):
            ev.as_trained(other.datasets[0], TASKS)


def test_max_cases(job, tmp_path):
    config = make_config(tmp_path, evaluate={"max_cases": 1})
    result = ev.evaluate(Oracle(TASKS), ev.Job(job.run_dir, config, job.stores, TASKS, "test", "x"))
    assert result is not None
    assert [d["n"] for d in result["per_dataset"]] == [1, 1]


def test_slices_show_what_was_scored(job):
    ev.evaluate(Oracle(TASKS).eval(), job)
    files = sorted((job.run_dir / "evaluation" / "test.slices").iterdir())
    assert [read_slice(f).case for f in files] == ["brains/b0", "brains/b2", "organs/a0", "organs/a1"]
    piece = read_slice(files[2])
    label = label_of(0)
    assert (piece.case, piece.names, piece.z) == ("organs/a0", ["liver", "tumour"], 6)
    np.testing.assert_array_equal(piece.reference[1], label[6] == 2)
    np.testing.assert_array_equal(piece.prediction, piece.reference)


def test_slice_of_an_empty_case(tmp_path):
    nothing = np.zeros((5, 4, 4), bool)
    assert telling_plane([("x", nothing, nothing)]) == 2
    path = save_slice(tmp_path, "a/b c", np.zeros((5, 4, 4), np.float32), [("x", nothing, nothing)], (1.0, 1.0, 1.0))
    assert path.parent == tmp_path
    assert not read_slice(path).reference.any()


def test_results_say_which_checkpoint_they_are_about(job):
    first = replace(job, checkpoint="step_00000010", chosen="10")
    assert ev.others_before(first) == ""
    ev.evaluate(Oracle(TASKS).eval(), first)
    written = json.loads(job.path.read_text())
    assert (written["checkpoint"], written["chosen"], written["weights"]) == ("step_00000010", "10", "0123")
    assert ev.others_before(first) == ""
    assert ev.others_before(replace(first, weights_digest="4567")) == "step_00000010 (weights 0123)"
    job.path.write_text("{")
    assert ev.others_before(first) == ""


def test_pictures_of_two_checkpoints_are_never_mixed(job, monkeypatch):
    """A is interrupted, B runs to its end, A goes on: all pictures are A's, also of the scans it did before B."""
    plain = ev.score_scan

    def interrupted(model, of, case):
        if case.row.case_id == "b2":
            raise KeyboardInterrupt
        return plain(model, of, case)

    a, b = job, replace(job, weights_digest="4567")
    monkeypatch.setattr(ev, "score_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(Oracle(TASKS).eval(), a)
    assert not (job.out_dir / "test.slices").exists()
    monkeypatch.setattr(ev, "score_scan", plain)
    ev.evaluate(Oracle(TASKS, shift=3).eval(), b)
    ev.evaluate(Oracle(TASKS).eval(), a)
    pieces = [read_slice(path) for path in (job.out_dir / "test.slices").iterdir()]
    assert len(pieces) == 4
    assert all(np.array_equal(piece.prediction, piece.reference) for piece in pieces)
    small = replace(b, config=job.config.model_copy(update={"evaluate": EvaluateConfig(max_cases=1)}))
    ev.evaluate(Oracle(TASKS).eval(), small)
    assert len(list((job.out_dir / "test.slices").iterdir())) == 2, "those of the larger evaluation are gone"


def test_during_training_writes_history_and_gauges(job, tmp_path, monkeypatch):
    class Engine:
        def averaged_weights(self):
            return {"anchor": torch.zeros(1)}

    class Run:
        rank, world_size, device, signalled = 0, 1, torch.device("cpu"), False
        lines: ClassVar[list[str]] = []

        def barrier(self):
            pass

        def broadcast_int(self, value):
            return value

        def say(self, text):
            self.lines.append(text)

    class Gauges:
        seen: ClassVar[dict] = {}

        def evaluation(self, split, report):
            self.seen[split] = report["mean"]["dice"]

        def observe(self, name, value):
            self.seen[name] = value

    monkeypatch.setattr("hermes_dist.train.predict.build_model", lambda config, tasks: Oracle(tasks))
    config = make_config(tmp_path, evaluate={"split": "test", "bootstrap": 0})
    for step in (10, 20):
        ev.evaluate_during_training(Engine(), config, job.stores, TASKS, Run(), Gauges(), step)
    lines = [json.loads(line) for line in (config.run_dir / "evaluation" / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["mean"]["dice"]) for line in lines] == [(10, 1.0), (20, 1.0)]
    assert Gauges.seen["test"] == 1.0
    assert Gauges.seen["hermes_evaluation_duration_seconds"] > 0
    assert "mean Dice on test 1.000" in Run.lines[0]
    assert lines[1]["failed"] == []

    def broken(row):
        raise CorruptShardError("checksum does not match")

    monkeypatch.setattr(job.stores[0], "read_case", broken)
    assert ev.evaluate_during_training(Engine(), config, job.stores, TASKS, Run(), Gauges(), 30) is None
    assert "step 30: not scored: organs/a1: checksum does not match" in Run.lines
    last = json.loads((config.run_dir / "evaluation" / "history.jsonl").read_text().splitlines()[-1])
    assert len(last["failed"]) == 4
