"""The stream seen by one process: world sizes, resume, formats, waits, substitution."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hermes_dist.config import MonitorConfig
from hermes_dist.errors import ConfigError, QuarantineLimitError, StreamError, WaitTimeoutError
from hermes_dist.shards.store import open_store
from hermes_dist.stream import loader
from hermes_dist.stream.inline_source import InlineSource
from hermes_dist.stream.loader import attribute_wait, open_stream
from hermes_dist.stream.prepare import build_reader
from hermes_dist.stream.reader import Reader
from hermes_dist.telemetry.telemetry import Telemetry
from tests.stream.tools import make_config, real_samples, steps


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 4), (3, 2), (4, 1), (8, 2)])
def test_world_size_and_micro_batch_are_invisible(world: int, micro: int, store_paths: dict[str, Path]) -> None:
    reference = steps(make_config(), store_paths["zarr"])
    ranks = [steps(make_config(train__micro_batch=micro), store_paths["zarr"], r, world) for r in range(world)]
    for s, whole in enumerate(reference):
        parts = [ranks[r][s] for r in range(world)]
        assert len({len(p.micro_batches) for p in parts}) == 1
        assert all(1 <= len(b.image) <= micro for p in parts for b in p.micro_batches)
        assert {(p.pair_count, p.modality_count) for p in parts} == {(whole.pair_count, whole.modality_count)}
        assert sum(int(b.pair_mask.sum()) for p in parts for b in p.micro_batches) == whole.pair_count
        assert sum(int((b.modality_targets >= 0).sum()) for p in parts for b in p.micro_batches) == whole.modality_count
        assert [x for p in parts for x in real_samples([p])] == real_samples([whole])


def test_formats_agree_to_the_bit(store_paths: dict[str, Path]) -> None:
    zarr, tar = (real_samples(steps(make_config(), store_paths[form])) for form in ("zarr", "webdataset"))
    assert zarr == tar


def test_resume_is_a_start_step(store_paths: dict[str, Path]) -> None:
    whole = steps(make_config(), store_paths["zarr"])
    rest = [steps(make_config(), store_paths["zarr"], r, 2, start=3) for r in range(2)]
    assert [b.step for b in rest[0]] == [3]
    assert real_samples(rest[0]) + real_samples(rest[1]) == real_samples(whole[3:])


def test_the_seed_moves_everything(store_paths: dict[str, Path]) -> None:
    a, b = (real_samples(steps(make_config(run__seed=seed), store_paths["zarr"])) for seed in (1, 2))
    assert {x[2] for x in a}.isdisjoint({x[2] for x in b})


def test_unreadable_cases_are_replaced_alike_in_every_world(store_paths: dict[str, Path]) -> None:
    config = make_config(stream__faults={"chaos": {"corrupt": 0.3}}, train__max_steps=6)
    whole = steps(config, store_paths["zarr"])
    parts = [steps(config, store_paths["webdataset"], r, 3) for r in range(3)]
    assert sorted(x for p in parts for x in real_samples(p)) == sorted(real_samples(whole))
    events = [e for b in whole for e in b.events]
    quarantined = [(e["dataset"], e["case_id"]) for e in events if e["kind"] == "quarantine"]
    substituted = [e for e in events if e["kind"] == "substitution"]
    assert quarantined
    assert len(set(quarantined)) == len(quarantined)
    assert len(substituted) > len(quarantined)
    assert {(e["dataset"], e["case_id"]) for e in substituted} == set(quarantined)
    for event in substituted:
        assert event["substitute"] != event["case_id"]
        assert "injected damage" in event["error"]


def test_too_many_unreadable_cases_stop_the_run(store_paths: dict[str, Path]) -> None:
    config = make_config(stream__faults={"chaos": {"corrupt": 0.5}, "max_quarantined": 1}, train__max_steps=30)
    with pytest.raises(QuarantineLimitError, match=r"max_quarantined ?= ?1.*hermes-shard verify"):
        steps(config, store_paths["zarr"])


def test_passing_storage_failures_change_nothing(store_paths: dict[str, Path]) -> None:
    faults = {"chaos": {"transient": 0.4}, "backoff_s": 0.001, "retries": 20}
    disturbed = steps(make_config(stream__faults=faults), store_paths["zarr"])
    assert real_samples(disturbed) == real_samples(steps(make_config(), store_paths["zarr"]))
    retries = [e for b in disturbed for e in b.events if e["kind"] == "retry"]
    assert retries
    assert all(e["attempt"] >= 1 and e["pause_s"] > 0 for e in retries)


def test_failing_storage_stops_the_run(store_paths: dict[str, Path]) -> None:
    faults = {"chaos": {"transient": 1.0}, "backoff_s": 0.001, "retries": 2}
    with pytest.raises(StreamError, match=r"/case\d: storage failed 3 times.*stream.faults.retries") as caught:
        steps(make_config(stream__faults=faults), store_paths["zarr"])
    assert [(e["kind"], e["attempt"], e["position"]) for e in caught.value.events] == [("retry", 1, 0), ("retry", 2, 0)]


def test_storage_that_hangs_is_named_before_the_wait_for_it_ends(store_paths: dict[str, Path]) -> None:
    faults = {"chaos": {"transient": 1.0}, "backoff_s": 0.01, "retries": 1000}
    store = open_store(str(store_paths["zarr"]))
    reader, _ = build_reader(make_config(stream__faults=faults, stream__wait_limit_s=1), [store], store.collection.tasks)
    with pytest.raises(StreamError, match=r"/case\d: storage failed \d+ times.*stream.wait_limit_s, which bounds the attempts"):
        reader.read(reader.plan.rows(0, 1), 0)


def test_what_happened_in_the_step_that_failed_is_told(store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of the step's earlier samples and of the failing one: no batch will bring them to stream.jsonl."""
    read, seen = Reader.read, list[int]()

    def failing(self: Reader, rows: Any, index: int) -> Any:
        sample = read(self, rows, index)
        seen.append(sample.position)
        if sample.position < 2:
            sample.events = [{"kind": "retry", "position": sample.position}]
            return sample
        error = StreamError("case9: storage failed")
        error.events = [{"kind": "retry", "position": 2}]
        raise error

    monkeypatch.setattr(Reader, "read", failing)
    with pytest.raises(StreamError, match="case9") as caught:
        steps(make_config(), store_paths["zarr"])
    assert [e["position"] for e in caught.value.events] == [0, 1, 2]


def test_an_error_travels_through_ray_with_its_events() -> None:
    ray_blocks = pytest.importorskip("hermes_dist.stream.ray_blocks")
    error = QuarantineLimitError("3 unreadable cases")
    error.events = [{"kind": "substitution", "position": 7}]
    block = ray_blocks.encode_error(error)
    with pytest.raises(QuarantineLimitError, match="3 unreadable") as caught:
        list(ray_blocks.decode_block(block))
    assert caught.value.events == error.events


def test_the_share_of_waiting_leaves_evaluations_out() -> None:
    ordinary = [(0.1, 1.1)] * 9
    assert loader.wait_share([*ordinary, (0.1, 600.0)]) == pytest.approx(0.1 / 1.1)
    assert loader.wait_share([(0.0, 1.0)] * 9 + [(6.0, 7.0)]) == pytest.approx(6 / 16)
    assert loader.wait_share([(0.0, 0.0)]) == 0


def test_workers_follow_the_wait_within_their_bounds() -> None:
    wanted = pytest.importorskip("hermes_dist.stream.ray_source").wanted_workers
    assert [wanted(n, 2, 8, 0.3) for n in (2, 3, 5, 7, 8)] == [3, 5, 8, 8, 8]
    assert [wanted(n, 2, 8, 0.0) for n in (2, 3, 8)] == [2, 2, 7]
    assert wanted(4, 2, 8, 0.03) == 4


def test_a_change_of_workers_is_judged_only_once_it_is_in_use() -> None:
    source: Any = object.__new__(pytest.importorskip("hermes_dist.stream.ray_source").RaySource)
    source._config, source._most_workers = make_config(stream__workers=2, stream__max_workers=8).stream, 8
    source._workers = source._workers_in_use = 2
    assert source.scale(0.3) == "30.0% of the last steps was waiting for samples: 3 workers instead of 2"
    assert source.scale(0.3) is None, "the pipeline that runs still has two"
    source._workers_in_use = 3
    assert "5 workers instead of 3" in source.scale(0.3)


def test_a_source_that_scales_is_heard(store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "JUDGED_STEPS", 2)
    monkeypatch.setattr(InlineSource, "scale", lambda self, share: f"share {share >= 0}")
    batches = steps(make_config(train__max_steps=6), store_paths["zarr"])
    told = [b.step for b in batches for e in b.events if e["kind"] == "note" and e["message"] == "share True"]
    assert told == [3, 5]  # said with the step after the one that was judged


def test_a_wait_has_a_limit_and_says_for_what(store_paths: dict[str, Path]) -> None:
    config = make_config(stream__faults={"chaos": {"slow_s": 1.5}}, stream__wait_limit_s=0.2)
    began = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=r"sample of position 0 \(step 0, backend inline"):
        steps(config, store_paths["zarr"])
    assert time.monotonic() - began < 15


def test_what_passed_before_anybody_waited_does_not_count(store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long evaluation the last sample is old, and that is nobody's fault."""
    config = make_config(train__max_steps=2, stream__prefetch=100)
    store = open_store(str(store_paths["zarr"]))
    tasks = store.collection.tasks
    with open_stream(config, [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        stream._thread.join(60)  # all has been read
        stream._progress -= 1000
        get, asked = stream._ready.get, []

        def late(*args: Any, **more: Any) -> Any:
            asked.append(more)
            if len(asked) == 1:
                raise queue.Empty
            return get(*args, **more)

        monkeypatch.setattr(stream._ready, "get", late)
        assert next(iter(stream)).step == 0


def test_waits_are_attributed(store_paths: dict[str, Path]) -> None:
    for batch in steps(make_config(), store_paths["zarr"]):
        assert set(batch.wait_parts_s) == {"storage", "decode", "augment", "transfer", "queue"}
        assert sum(batch.wait_parts_s.values()) == pytest.approx(batch.data_wait_s, abs=1e-9)
    parts = attribute_wait(10.0, {"storage": 1.0, "augment": 3.0}, 2)
    assert parts == {"storage": 1.0, "decode": 0.0, "augment": 3.0, "transfer": 0.0, "queue": 6.0}
    assert attribute_wait(2.0, {"storage": 1.0, "augment": 3.0}, 2)["augment"] == pytest.approx(1.5)
    # Four workers at once took one second of this wait; the rest was nobody's work.
    parts = attribute_wait(2.0, {"storage": 1.0, "augment": 3.0}, 8, at_once=4)
    assert parts == pytest.approx({"storage": 0.25, "decode": 0, "augment": 0.75, "transfer": 0, "queue": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mixture": {"weights": {"livr": 1.0}}}, r"'livr'.*Did you mean 'liver'"),
        ({"data__split": "trian"}, r"data.split = 'trian' holds no case; the stores have train.*Did you mean 'train'"),
        ({"data__foreground": {"class_weights": {"liver/tumor": 2.0}}}, r"'liver/tumor'.*Did you mean 'liver/tumour'"),
        ({"stream__faults": {"chaos": {"corupt": 0.1}}}, r"unknown fault 'corupt'.*Did you mean 'corrupt'"),
    ],
)
def test_bad_input_fails_before_the_first_step(changes: dict[str, Any], message: str, store_paths: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        steps(make_config(**changes), store_paths["zarr"])


def test_patch_larger_than_every_case_is_padded_and_stated(store_paths: dict[str, Path]) -> None:
    config = make_config(data__patch_vox_zyx=(64, 64, 64), augment__enabled=False, train__max_steps=1)
    (batch,) = steps(config, store_paths["zarr"])
    notes = [e for e in batch.events if e["kind"] == "note"]
    assert {e["dataset"] for e in notes} == {"liver", "heart", "brain"}
    assert all("padded" in e["message"] for e in notes)
    image = batch.micro_batches[0].image
    assert image.shape[1:] == (1, 64, 64, 64)
    assert torch.equal(image[0, 0, 0], torch.full((64, 64), float(image[0].min())))


def test_identities_name_dataset_case_and_crop(store_paths: dict[str, Path]) -> None:
    batches = steps(make_config(augment__enabled=False), store_paths["zarr"])
    augmented = steps(make_config(), store_paths["zarr"])
    for a, b in zip(batches, augmented, strict=True):
        assert np.array_equal(a.identities, b.identities)
    assert len(np.unique(np.concatenate([b.identities for b in batches]))) > 20


def test_augmentation_on_the_device_is_that_of_the_workers_to_rounding(store_paths: dict[str, Path]) -> None:
    here = steps(make_config(), store_paths["zarr"])
    there = steps(make_config(augment__where="device"), store_paths["zarr"])
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.identities, b.identities)
        for x, raw in zip(a.micro_batches, b.micro_batches, strict=True):
            assert len(raw.pending) == len(raw.image)
            y = raw.to("cpu")
            assert not y.pending
            torch.testing.assert_close(x.image, y.image, atol=2e-3, rtol=0)
            assert (x.label != y.label).float().mean() < 2e-3
            assert y.label.dtype == x.label.dtype


def test_auto_moves_the_augmentation_when_the_rank_waits(store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "JUDGED_STEPS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    slow = {"chaos": {"slow_s": 0.01}}
    batches = steps(make_config(augment__where="auto", stream__faults=slow, train__max_steps=10), store_paths["zarr"])
    assert not batches[0].micro_batches[0].pending
    assert batches[-1].micro_batches[0].pending
    notes = [e["message"] for b in batches for e in b.events if e["kind"] == "note"]
    assert any("augment.where=auto" in n for n in notes)


def test_a_source_is_told_of_a_feeder_that_still_waits(
    store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Storage that hangs: the source is asked to give up, and whoever closes it must know that somebody reads it."""
    release, told = threading.Event(), list[bool | str]()

    def stuck(self: InlineSource) -> Iterator[Any]:
        release.wait(60)
        yield from ()

    monkeypatch.setattr(InlineSource, "__iter__", stuck)
    monkeypatch.setattr(InlineSource, "give_up", lambda self: told.append("give up"))
    monkeypatch.setattr(InlineSource, "close", lambda self, *, still_read: told.append(still_read))
    monkeypatch.setattr(loader, "FEEDER_LIMIT_S", 0.1)
    store = open_store(str(store_paths["zarr"]))
    tasks = store.collection.tasks
    with open_stream(make_config(), [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None) as stream:
        pass
    release.set()
    stream._thread.join(60)
    stream.close()
    assert "giving up the sample of position 0 (this process to read it)" in capsys.readouterr().err
    assert told == ["give up", True, False]


def test_a_feeder_that_is_given_up_ends(store_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that can end the wait does, and is then closed as one that nobody reads."""
    given_up, told = threading.Event(), list[bool]()

    def stuck(self: InlineSource) -> Iterator[Any]:
        given_up.wait(60)
        raise StreamError("given up")
        yield

    monkeypatch.setattr(InlineSource, "__iter__", stuck)
    monkeypatch.setattr(InlineSource, "give_up", lambda self: given_up.set())
    monkeypatch.setattr(InlineSource, "close", lambda self, *, still_read: told.append(still_read))
    store = open_store(str(store_paths["zarr"]))
    tasks = store.collection.tasks
    stream = open_stream(make_config(), [store], tasks, rank=0, world_size=1, start_step=0, telemetry=None)
    real_join, joins = stream._thread.join, list[bool]()

    def join(timeout: float) -> None:
        joins.append(given_up.is_set())
        real_join(60 if given_up.is_set() else 0.1)

    monkeypatch.setattr(stream._thread, "join", join)
    stream.close()
    assert joins == [False, True]
    assert told == [False]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_in_quarantine_is_shown_from_the_start_of_a_resumed_run(
    rank: int, store_paths: dict[str, Path], tmp_path: Path
) -> None:
    """Case 999 is of a collection that was larger."""
    store = open_store(str(store_paths["zarr"]))
    tasks, limit = store.collection.tasks, {"max_quarantined": 7}
    name = store.manifest.dataset_names[int(store.manifest.dataset_index[0])]
    telemetry = Telemetry(tmp_path, MonitorConfig(prometheus_port=-1), rank, 2, "r")
    telemetry.declare(tasks.datasets)

    def shown(metric: str, **labels: str) -> float | None:
        return telemetry._meters.registry.get_sample_value(metric, {"run": "r", "rank": str(rank), **labels})

    config = make_config(stream__faults=limit)
    with open_stream(
        config, [store], tasks, rank=rank, world_size=2, start_step=0, telemetry=telemetry, quarantined=[0, 999]
    ) as stream:
        first = {d.name: shown("hermes_quarantine_cases", dataset=d.name) for d in tasks.datasets}
        stream.quarantine.settle([], [[0], [1]], rank)
        after = shown("hermes_quarantine_cases", dataset=name)
    telemetry.close()
    if rank:  # the set is the job's: rank 0 shows it
        assert (set(first.values()), after) == ({None}, None)
        return
    assert first == {d.name: float(d.name == name) for d in tasks.datasets}
    assert (after, shown("hermes_quarantine_limit_cases")) == (2, 7)
