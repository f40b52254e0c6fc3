"""The order of checkpoint and evaluation in the loop, with a true training and a made-up result of the evaluation."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from hermes_dist.config import Config, resolve, set_dotted, validate
from hermes_dist.errors import HermesError, StreamError, UsageError, WaitTimeoutError
from hermes_dist.models import build_model
from hermes_dist.parallel.checkpoint import list_checkpoints
from hermes_dist.parallel.runtime import Runtime, start
from hermes_dist.parallel.stored import best_name, read_state
from hermes_dist.shards.case import CaseRecord
from hermes_dist.shards.store import create_store
from hermes_dist.stream.batch import StepBatch
from hermes_dist.stream.inline_source import InlineSource
from hermes_dist.train import evaluate as evaluation
from hermes_dist.train import trainer
from hermes_dist.train.evaluate import EvaluationStopped
from hermes_dist.train.trainer import train
from hermes_dist.volume.geometry import Grid
from hermes_dist.volume.preprocess import Preprocessing, place
from tests.train.tiny_run import TASKS, label_of, make_config

EVALUATE = "hermes_dist.train.trainer.evaluate_during_training"


@pytest.fixture
def runtime() -> Generator[Runtime]:
    session = start(Config())
    yield session
    session.close()


def run_config(folder: Path, *, scans: int = 1, **evaluate: Any) -> Config:
    """Three steps, each with a checkpoint and an evaluation of `scans` validation scans."""
    writer = create_store(str(folder / "store"), "zarr", tasks=TASKS, preprocessing=Preprocessing(image_dtype="float32"))
    label = label_of(0, (32, 32, 32))
    placement = json.dumps(
        place(Grid(np.diag([-1.5, 1.5, 1.5, 1.0]), label.shape), None, Preprocessing(crop_body=False)).to_json()
    )
    for name in ("train", "val", *(f"val{number}" for number in range(2, scans + 1))):
        split = "train" if name == "train" else "val"
        record = CaseRecord("organs", name, "CT", split, (1.5, 1.5, 1.5), placement, name)
        writer.write_case(record, label.astype(np.float32), label)
    writer.finish()
    return make_config(
        folder,
        data={"stores": [str(folder / "store")], "patch_vox_zyx": [32, 32, 32]},
        stream={"backend": "inline"},
        augment={"enabled": False},
        train={"global_batch": 1, "max_steps": 3},
        checkpoint={"every_steps": 1, "keep": 1},
        monitor={"prometheus_port": -1},
        evaluate={"every_steps": 1, **evaluate},
    )


def test_a_kill_during_an_evaluation_loses_nothing(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    dice, asked = {1: 0.5, 2: 0.9, 3: 0.1}, []

    def killed(*args: Any) -> float:
        asked.append(args[-1])
        if asked == [1, 2]:
            raise KeyboardInterrupt
        return dice[args[-1]]

    monkeypatch.setattr(EVALUATE, killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, runtime)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    assert list_checkpoints(config.run_dir)[0].step == 2
    assert train(config, runtime).step == 3
    assert asked == [1, 2, 2, 3]
    checkpoints = config.run_dir / "checkpoints"
    assert (checkpoints / "best").read_text() == "step_00000002\n"
    assert [c.step for c in list_checkpoints(config.run_dir)] == [3, 2]
    assert [read_state(c)["best_dice"] for c in list_checkpoints(config.run_dir)] == [0.9, 0.9]
    train(config, runtime)
    assert asked == [1, 2, 2, 3]


@pytest.mark.parametrize(("at", "every_steps"), [(1, 1), (2, 0), (3, 1)], ids=["due", "no checkpoint due", "last step"])
def test_a_stop_during_an_evaluation_ends_it_between_scans(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, at: int, every_steps: int
) -> None:
    """No score, no best, the usual end with a checkpoint; the next start scores what is missing, and each scan once a step."""
    config = changed(run_config(tmp_path, scans=3, bootstrap=0), f"checkpoint.every_steps={every_steps}", "checkpoint.keep=9")
    plain, scored, history = evaluation.score_scan, [], config.run_dir / "evaluation" / "history.jsonl"

    def stops(model: Any, job: Any, case: Any) -> Any:
        scored.append((int(job.checkpoint.removeprefix("step_")), case.row.case_id))
        if len(scored) == 3 * at - 1:
            runtime.request_stop()
        return plain(model, job, case)

    def scored_steps() -> list[int]:
        return [json.loads(line)["step"] for line in history.read_text().splitlines()] if history.exists() else []

    monkeypatch.setattr(evaluation, "score_scan", stops)
    result = train(config, runtime)
    assert (result.step, result.stopped_early) == (at, True)
    assert len(scored) == 3 * at - 1
    assert scored_steps() == list(range(1, at))
    stored = list_checkpoints(config.run_dir)[0]
    assert (stored.step, read_state(stored)["evaluated_step"]) == (at, at - 1)
    assert best_name(config.run_dir) != stored.path.name
    runtime.stop_requested = runtime._signalled = False
    result = train(config, runtime)
    assert (result.step, result.stopped_early) == (3, False)
    assert scored_steps() == [1, 2, 3]
    assert sorted(scored) == [(step, name) for step in (1, 2, 3) for name in ("val", "val2", "val3")]
    assert read_state(list_checkpoints(config.run_dir)[0])["evaluated_step"] == 3


def test_a_stop_during_the_evaluation_of_a_start_trains_no_step(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step would leave the evaluation behind: it is due at this one only."""
    config, asked = run_config(tmp_path), []

    def stopped(*args: Any) -> float:
        asked.append(args[-1])
        if len(asked) < 3:
            runtime.request_stop()
            raise EvaluationStopped
        return 0.5

    monkeypatch.setattr(EVALUATE, stopped)
    for count in (1, 2):
        result = train(config, runtime)
        assert (result.step, result.stopped_early, len(asked)) == (1, True, count)
        runtime.stop_requested = runtime._signalled = False
    assert train(config, runtime).step == 3
    assert asked == [1, 1, 1, 2, 3]


@pytest.mark.parametrize(("stage", "every_steps"), [(1, 1), (3, 0)])
def test_what_a_training_tells_those_who_watch_it(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stage: int, every_steps: int
) -> None:
    config = run_config(tmp_path)
    checkpoint = config.checkpoint.model_copy(update={"every_steps": every_steps})
    config = config.model_copy(update={"checkpoint": checkpoint, "deepspeed": {"zero_optimization": {"stage": stage}}})
    seen: list[dict[str, float | None]] = []
    registry: list[CollectorRegistry] = []

    def watched(*args: Any) -> float:
        registry[:] = [args[5]._meters.registry]
        seen.append({name: value(f"hermes_{name}") for name in ("parameters", "world_size", "evaluating")})
        return 0.5

    def value(name: str, **labels: str) -> float | None:
        return registry[0].get_sample_value(name, {"run": "run", "rank": "0", **labels})

    monkeypatch.setattr(EVALUATE, watched)
    train(config, runtime)
    parameters = sum(p.numel() for p in build_model(config.model, TASKS).parameters())
    assert seen == [{"parameters": parameters, "world_size": 1, "evaluating": 1}] * 3
    assert (value("hermes_checkpoint_timestamp_seconds") is not None) == (every_steps > 0)
    assert value("hermes_evaluating") == 0
    # `brains` has no case here: no share of the samples, and no alert for that.
    assert value("hermes_dataset_samples_total", dataset="organs") == 3
    assert value("hermes_dataset_samples_total", dataset="brains") is None
    assert value("hermes_foreground_pairs_total", dataset="organs", task="liver") == 3
    assert value("hermes_foreground_pairs_total", dataset="brains", task="stem") is None


def test_an_empty_split_is_found_before_anything_is_written(tmp_path: Path, runtime: Runtime) -> None:
    config = run_config(tmp_path, split="vla")
    with pytest.raises(UsageError, match=r"split 'vla' has no case.*Did you mean 'val'"):
        train(config, runtime)
    assert not config.run_dir.exists()


def changed(config: Config, *overrides: str) -> Config:
    data = config.model_dump(mode="json")
    for override in overrides:
        set_dotted(data, override)
    return resolve(validate(data))


def positions_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Is filled with the plan's positions of every step that is trained from now on."""
    seen: list[list[int]] = []
    plain = trainer._share

    def watched(batch: Any, *others: Any) -> Any:
        samples = plain(batch, *others)
        seen.append(sorted(samples[:, 0].tolist()))
        return samples

    monkeypatch.setattr(trainer, "_share", watched)
    return seen


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.initial_weights=nowhere", "nowhere: no undamaged checkpoint"), ("model.backbone=nnunet", "has no prior fusion")],
)
def test_a_model_that_cannot_be_made_leaves_no_run_directory(
    tmp_path: Path, runtime: Runtime, override: str, message: str
) -> None:
    data = run_config(tmp_path).model_dump(mode="json")
    set_dotted(data, override)
    config = resolve(validate(data))
    with pytest.raises(HermesError, match=message):
        train(config, runtime)
    assert not config.run_dir.exists()


def test_another_global_batch_neither_skips_nor_repeats_samples(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = positions_of_steps(monkeypatch)
    config = run_config(tmp_path, every_steps=0)
    for steps, batch in ((2, 1), (4, 3), (5, 2)):
        train(changed(config, f"train.max_steps={steps}", f"train.global_batch={batch}"), runtime)
    assert seen == [[0], [1], [2, 3, 4], [5, 6, 7], [8, 9]]


def test_the_step_s_stall_is_the_longest_wait_of_any_rank() -> None:
    """What ranks wait is gathered with the samples' positions, and is neither a sample nor an unreadable case."""
    settled: list[list[int]] = []
    others = [[4, 44, trainer.WAITED, 2_500_000], [trainer.UNREADABLE, 8, trainer.UNREADABLE, 9, trainer.WAITED, 0]]

    class World:
        world_size, rank = 3, 0

        def gather_int64(self, mine: np.ndarray) -> list[np.ndarray]:
            assert mine.dtype == np.int64
            return [mine, *(np.array(part) for part in others)]

    class Settles:
        def settle(self, events: list[Any], found: list[list[int]], rank: int) -> list[Any]:
            settled.extend(found)
            return events

    stream: Any = SimpleNamespace(quarantine=Settles())
    positions, identities = np.array([3]), np.array([33])
    batch = StepBatch(0, [], 1, 0, identities, positions, data_wait_s=0.25, unreadable=(7,))
    samples = trainer._share(batch, stream, cast("Runtime", World()))
    assert samples.tolist() == [[3, 33], [4, 44]]
    assert settled == [[7], [], [8, 9]]
    assert (batch.data_wait_s, batch.data_stall_s) == (0.25, 2.5)


def test_another_order_is_recorded(tmp_path: Path, runtime: Runtime) -> None:
    config = run_config(tmp_path, every_steps=0)
    for steps, probability in ((2, 0.5), (3, 0.25), (4, 0.25)):
        train(changed(config, f"train.max_steps={steps}", f"data.foreground.probability={probability}"), runtime)
    events = [json.loads(line) for line in (config.run_dir / "stream.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "changed_order"] == [2]


def test_a_stream_that_cannot_be_tidied_up_costs_no_checkpoint(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path, every_steps=0)

    def fails(self: InlineSource, *, still_read: bool) -> None:
        assert [s.step for s in list_checkpoints(config.run_dir)] == [3], "the checkpoint is complete before"
        raise WaitTimeoutError("Ray did not end within 60 s")

    monkeypatch.setattr(InlineSource, "close", fails)
    assert train(config, runtime).step == 3
    assert "warning: WaitTimeoutError while the stream was closed: Ray did not end" in capsys.readouterr().err


def test_what_ended_a_run_is_recorded_with_what_came_before(tmp_path: Path, runtime: Runtime) -> None:
    config = run_config(tmp_path, every_steps=0)
    faults = ['stream.faults.chaos={"transient": 1.0}', "stream.faults.retries=2", "stream.faults.backoff_s=0.001"]
    with pytest.raises(StreamError, match="organs/train: storage failed 3 times"):
        train(changed(config, *faults), runtime)
    events = [json.loads(line) for line in (config.run_dir / "stream.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in events] == [("retry", 0), ("retry", 0), ("failure", 0)]
    assert events[-1]["error"].startswith("StreamError: organs/train: storage failed 3 times")
