"""What Ray's scheduling loop is asked between its rounds."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

cloudpickle = pytest.importorskip("ray.cloudpickle")

from hermes_dist.errors import StreamError  # noqa: E402
from hermes_dist.stream import ray_pace  # noqa: E402


def test_it_rests_longer_while_the_rank_has_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rests = list[float]()
    monkeypatch.setattr(time, "sleep", rests.append)
    pace = ray_pace.pace_for("some run")()
    for idling in (True, False):
        pace.on_execution_step(SimpleNamespace(_consumer_idling=lambda idling=idling: idling))
    assert rests == [ray_pace.HUNGRY_PAUSE_S, ray_pace.SATED_PAUSE_S]


def test_only_the_pipelines_of_the_source_that_was_given_up_end() -> None:
    executor = SimpleNamespace(_consumer_idling=lambda: True)
    left, other = ray_pace.pace_for("left"), ray_pace.pace_for("other")
    ray_pace.give_up("left")
    with pytest.raises(StreamError, match="given up"):
        left().on_execution_step(executor)
    other().on_execution_step(executor)


def test_the_class_travels_to_the_workers() -> None:
    """Ray sends the context of a pipeline, this class in it, to every worker."""
    assert cloudpickle.loads(cloudpickle.dumps(ray_pace.pace_for("a run"))).source == "a run"
