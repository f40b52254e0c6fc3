"""One thread that does things in order and never keeps the interpreter alive.

A `ThreadPoolExecutor` would do, but Python waits for its threads at exit without a limit, and what runs here are calls into Ray
that may never return on a broken host.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Starter:
    """A daemon thread with a queue of calls. Their errors are those of the futures."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call a function after all that was asked for before."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*args)))
        return future

    def finish(self) -> None:
        """End the thread after what was asked for; returns at once."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            _answer(*call)
            del call  # what a call returned must not live on here


def _answer(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # handed to whoever asks for the result
        future.set_exception(error)
