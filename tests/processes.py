"""Tests with several real processes: gloo ranks of one pool, each task with a time limit.

Starting a process that imports torch takes seconds, so the ranks of a pool stay and are sent one task after
another: the name of a function, importable from the test's module, and its arguments. A rank that does not
answer in time is killed with its whole pool, and the test fails: a hang is a fault, not a wait.
"""

from __future__ import annotations

import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 60  # seconds a task may take
START = 300  # seconds that starting may take, where all of a machine's processes start at once


class Failed(AssertionError):
    """A rank's own traceback."""


def _serve(rank: int, size: int, store: str, inbox, outbox) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT)
    )
    outbox.put((rank, True, None))
    while True:  # until it is killed
        function, args = inbox.get()
        try:
            outbox.put((rank, True, function(rank, *args)))
        except BaseException:
            outbox.put((rank, False, traceback.format_exc()))


class Pool:
    """So many ranks; ``pool.run(function, *args)`` gives what ``function(rank, *args)`` gave on each."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name, "store"))
        self.inboxes = [context.Queue() for _ in range(self.size)]
        self.outbox = context.Queue()
        self.ranks = [
            context.Process(target=_serve, args=(rank, self.size, store, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.ranks:
            process.start()
        self._collect(START)

    def run(self, function: Callable, *args: object, limit: float = LIMIT) -> list:
        """What each rank gave. Raises Failed with the traceback of a rank that failed, or of a hang."""
        for inbox in self.inboxes:
            inbox.put((function, args))
        try:
            return self._collect(limit)
        except Failed:
            # What a rank left half done would fail the next task.
            self.stop()
            self._start()
            raise

    def _collect(self, limit: float) -> list:
        """One answer of each rank."""
        results, failures = {}, {}
        while len(results) + len(failures) < self.size:
            try:
                rank, good, value = self.outbox.get(timeout=limit)
            except queue.Empty:
                silent = sorted(set(range(self.size)) - results.keys() - failures.keys())
                told = "".join(f"\nrank {rank}: {text}" for rank, text in failures.items())
                raise Failed(f"ranks {silent} gave no answer in {limit} s{told}") from None
            (results if good else failures)[rank] = value
        if failures:
            raise Failed("".join(f"\nrank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        self.folder.cleanup()
