"""Several processes that train one run: they meet, agree, share gradients, and end together."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parts.compute.device import in_short

TO_MEET = timedelta(minutes=3)  # gloo's connections sometimes fail without a word
TO_WAIT = timedelta(minutes=30)  # for the first, which evaluates, samples and saves alone


@dataclass(frozen=True)
class Ranks:
    """The processes of one run. Rank 0 leads: it alone writes, samples and evaluates."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the other processes that torchrun started; alone without it. Tensors travel by gloo
        from CPUs, by NCCL from GPUs. Raises ConnectionError."""
        needed = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}
        if not needed <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
            return cls()
        backends = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            if dist.is_nccl_available():
                backends = "cpu:gloo,cuda:nccl"
        try:
            store, rank, count = next(dist.rendezvous("env://", timeout=TO_MEET))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else machines may count differently
                attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
                store = dist.PrefixStore(attempt, store)
            meeting = dict(store=store, rank=rank, world_size=count, timeout=TO_MEET)
            dist.init_process_group(backends, **meeting)
            dist.distributed_c10d._set_pg_timeout(TO_WAIT)
        except (RuntimeError, ValueError) as error:
            problem = f"the processes of this run do not reach each other ({in_short(error)})"
            raise ConnectionError(problem) from error
        return cls(dist.get_rank(), dist.get_world_size())

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each by its mean over the ranks, the same bits on all. Raises ConnectionError."""
        if self.count == 1:
            return
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
            self.largest(0)  # NCCL would wait for a process that is gone; gloo says so
        with self.connected():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()
        for tensor in tensors:
            tensor /= self.count

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers. Raises ConnectionError."""
        if self.count == 1:
            return number
        value = torch.tensor(number)
        with self.connected():
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks. Raises ConnectionError."""
        texts = [text] * self.count
        if self.count > 1:
            with self.connected():
                dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Tell that a process does not answer. Raises ConnectionError."""
        try:
            yield
        except RuntimeError as error:
            problem = f"another process of this run is gone ({in_short(error)})"
            raise ConnectionError(problem) from error

    def end(self, code: int) -> None:
        """End this process at once, if there are others: on its way out PyTorch may wait for them,
        and they for it, or abort."""
        if self.count > 1:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, AttributeError, ValueError):
                    stream.flush()
            os._exit(code)
