"""Training never waits for a disk: copies in memory, written by a thread."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

import torch

from parts.compute.device import in_short, is_out_of_memory
from parts.run.directory import RunDir

log = logging.getLogger("train")


class Snapshot:
    """A copy of tensors in memory that is allocated once.

    Of tensors on a GPU it is page-locked, if the system grants that; PyTorch then rounds each
    buffer up to a power of two bytes. Without memory for a copy, `is_copy` becomes False and `take`
    returns the tensors themselves, which must be written before they change.
    """

    page_locked = True

    def __init__(self, stream: "torch.cuda.Stream | None" = None) -> None:
        self.stream = stream  # on which copies from a GPU are made
        self.is_copy = True
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, values: dict) -> dict:
        """The same nested dictionaries with the copies in them, complete after `wait`: on a GPU
        they are made beside the next forward and backward pass, which only read."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):  # None: nothing
                return self._copied(values) if self.is_copy else values
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("No memory for a copy: training waits for saves (%s)", in_short(error))
            self.is_copy = False
            self.buffers.clear()
            return values

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self.stream is not None:
            self.stream.synchronize()

    def _copied(self, values, path: str = ""):
        if isinstance(values, dict):
            return {key: self._copied(value, f"{path}/{key}") for key, value in values.items()}
        if not isinstance(values, torch.Tensor):
            return values
        if path not in self.buffers:
            self.buffers[path] = self._buffer(values)
        return self.buffers[path].copy_(values, non_blocking=values.is_cuda)

    def _buffer(self, values: torch.Tensor) -> torch.Tensor:
        if values.is_cuda and Snapshot.page_locked:
            try:
                return torch.empty_like(values, device="cpu", pin_memory=True)
            except RuntimeError as error:
                refused = "the system refused page-locked memory"
                log.warning("Saves will be slower: %s (%s)", refused, in_short(error))
                Snapshot.page_locked = False
        return torch.empty_like(values, device="cpu")


@dataclass(frozen=True)
class Task:
    """Something to write, and what to do when it is written."""

    name: str
    write: Callable[[], None]  # raises OSError
    done: Callable[[], None] = lambda: None


class Writer:
    """Works through tasks on a thread of its own while training goes on, one list at a time. The
    thread only writes; `collect` logs and keeps the books, so nothing needs a lock."""

    def __init__(self, run: RunDir):
        self.run = run
        self._ended: list[tuple[Task, BaseException | None]] = []
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, tasks: list[Task]) -> None:
        """Begin with these, after any earlier ones."""
        self.finish()
        # A second Ctrl-C leaves a daemon behind.
        self._thread = Thread(target=self._work, args=[tasks], daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no memory for a thread
            self._work(tasks)

    def _work(self, tasks: list[Task]) -> None:
        for task in tasks:
            try:
                task.write()
                self._ended.append((task, None))
            except BaseException as error:
                self._ended.append((task, error))

    def collect(self) -> None:
        """Report what became of the tasks, once all are done. Raises what is no OSError."""
        if self.busy:
            return
        ended = self._ended
        self._ended = []
        for task, error in ended:
            with self.run.attempt(task.name):
                if error is not None:
                    raise error
                task.done()

    def finish(self) -> None:
        """Wait for the tasks under way, and report."""
        if self._thread is not None and self.busy:
            self._thread.join()
        self.collect()
