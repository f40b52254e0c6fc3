"""One rank's hang is everybody's: all ranks dump their stacks, so that the logs show who waits for whom.

A rank whose wait reached its limit prints its own stacks and leaves a note in the launcher's key-value store; a thread of every
other rank looks there once a second, prints its stacks, and ends the process if it is still stuck some seconds later. The store's
server is a thread outside Python on rank 0's host (or in torchrun's agent), so that it answers while ranks are stuck.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

EXIT_HANG = 74
POLL_S = 1.0
LEAVE_S = 10.0
"""After an alarm: time for an error of the main thread, which says more, to end the process first."""
_KEY = "hermes/hang"


def dump_stacks(headline: str, error: BaseException | None = None) -> None:
    """All threads' stacks on stderr, below a line that says why and the place where `error` was raised."""
    print(headline, file=sys.stderr)
    if error is not None:
        traceback.print_exception(error)
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    sys.stderr.flush()


class Alarm:
    """This rank's ear and bell. Without a store (a world of one) it only dumps this process's stacks."""

    def __init__(self, store: dist.Store | None, rank: int, *, exit_code: int | None = EXIT_HANG) -> None:
        """`store` is used by the listening thread alone, apart from `ring`; it must be unique to this attempt of the run."""
        self._store, self._rank, self._exit_code = store, rank, exit_code
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._dumped = False
        if store is not None:
            threading.Thread(target=self._listen, name="hang-alarm", daemon=True).start()

    def ring(self, what: str, error: BaseException | None = None) -> None:
        """Dump the stacks here and on all other ranks; returns once they had time to hear. Only the first call acts."""
        if not self._dump(f"hang: {what}; stacks of all threads of rank {self._rank} follow", error):
            return
        if self._store is not None:
            try:
                self._store.set(_KEY, what)
            except RuntimeError as error:
                print(f"the other ranks could not be told ({error})", file=sys.stderr, flush=True)
                return
            # Rank 0 may hold the store: it must not end before the others have looked.
            time.sleep(3 * POLL_S)

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()

    def _dump(self, headline: str, error: BaseException | None = None) -> bool:
        with self._lock:
            first, self._dumped = not self._dumped, True
        if first:
            dump_stacks(headline, error)
        return first

    def _listen(self) -> None:
        assert self._store is not None
        while not self._closed.wait(POLL_S):
            try:
                if not self._store.check([_KEY]):
                    continue
                what = self._store.get(_KEY).decode()
            except RuntimeError:
                return  # whoever held the store has ended: its collectives fail, and say so
            self._dump(f"hang reported by another rank: {what}; stacks of all threads of rank {self._rank} follow")
            if self._exit_code is not None and not self._closed.wait(LEAVE_S):
                print(f"rank {self._rank} is still stuck: ending it", file=sys.stderr, flush=True)
                os._exit(self._exit_code)
            return
