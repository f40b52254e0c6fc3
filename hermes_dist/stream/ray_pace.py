"""What Ray Data's scheduling loop is asked to do between its rounds: rest, and end a pipeline that nobody wants any more."""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

from hermes_dist.errors import StreamError

HUNGRY_PAUSE_S, SATED_PAUSE_S = 0.01, 0.03

_given_up: set[str] = set()


class Pace(ExecutionCallback):
    """Lets Ray's scheduling loop rest between rounds.

    Without it the loop spins in the training process whenever finished samples wait to be taken, which is the normal case: with
    Ray 2.60 most of a core, and the interpreter's lock, beside every rank (tests/bench/test_stream_pace.py).
    """

    source = ""
    """Whose pipelines these are: the name that `give_up` takes."""

    def on_execution_step(self, executor: Any) -> None:
        """A short rest while the rank waits for samples, a longer one while it has some.

        Raises:
            StreamError: the source was given up. Ray hands it to whoever reads the pipeline.
        """
        if self.source in _given_up:
            raise StreamError("the pipeline was given up: its workers did not answer")
        time.sleep(HUNGRY_PAUSE_S if executor._consumer_idling() else SATED_PAUSE_S)


def pace_for(source: str) -> type[Pace]:
    """A `Pace` by which the pipelines of one source can be given up. Ray takes classes, which travel to its workers."""
    return type("Pace", (Pace,), {"source": source})


def give_up(source: str) -> None:
    """Make every pipeline of a source end with an error, whatever its workers do (they may hang)."""
    _given_up.add(source)
