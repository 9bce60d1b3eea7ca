"""Requests of programs to one pipeline: gathered into batches, and refused when too many wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import PysegError


class Busy(PysegError):
    """More work waits than will be taken; try again later."""


class Dispatcher:
    """One thread that computes what waits, as many at a time as fit into a batch.

    Where a batch fails, its members are tried one by one, so that one bad image fails alone.

    Args:
        compute: takes a list, returns as many results.
        batch: members at most.
        waiting: that may wait, beside those being computed.
    """

    def __init__(
        self, compute: Callable[[list[Any]], Sequence[Any]], *, batch: int = 8, waiting: int = 64
    ) -> None:
        self.compute, self.batch, self.waiting = compute, batch, waiting
        self._queue: deque[tuple[Any, Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pyseg-studio", daemon=True)
        self._thread.start()

    def submit(self, item: Any) -> Future[Any]:
        """The result to come of one member. To cancel it takes it out as long as it waits.

        Raises:
            Busy: ``waiting`` wait already.
        """
        future: Future[Any] = Future()
        with self._changed:
            # What was given up does not keep others out.
            if len(self._queue) >= self.waiting:
                self._queue = deque(one for one in self._queue if not one[1].cancelled())
            if self._closed or len(self._queue) >= self.waiting:
                raise Busy(f"{len(self._queue)} requests wait already; try again in a second")
            self._queue.append((item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends after what is being computed; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for _, future in self._queue:
                future.cancel()
            self._queue.clear()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                count = min(self.batch, len(self._queue))
                taken = [self._queue.popleft() for _ in range(count)]
            taken = [one for one in taken if one[1].set_running_or_notify_cancel()]
            if taken:
                self._serve(taken)

    def _serve(self, taken: list[tuple[Any, Future[Any]]]) -> None:
        try:
            results = list(self.compute([item for item, _ in taken]))
        except Exception as error:
            if len(taken) == 1:
                taken[0][1].set_exception(error)
            else:
                for one in taken:
                    self._serve([one])
            return
        for (_, future), result in zip(taken, results, strict=True):
            future.set_result(result)


__all__ = ["Busy", "Dispatcher"]
