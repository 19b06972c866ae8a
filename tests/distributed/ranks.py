"""A pool of processes, each a rank of a gloo group that lasts for one call."""

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Of a collective, and of a call: far beyond what either takes, so that nothing hangs for good.
COLLECTIVE_SECONDS = 300
CALL_SECONDS = 600


class Ranks:
    """Processes that run functions together.

    Args:
        folder: where the processes of a call find each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._workers: list[tuple[Any, Any]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function of a module on so many ranks, and return what each of them returns.

        Raises:
            AssertionError: a rank failed; with its traceback. All processes were ended then, for the
                others may wait for it.
        """
        self._start(world_size)
        self._calls += 1
        store = str(self._folder / f"store{self._calls}")
        workers = self._workers[:world_size]
        for rank, (_, connection) in enumerate(workers):
            connection.send_bytes(pickle.dumps((store, rank, world_size, function, arguments)))
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + CALL_SECONDS
        while len(results) < world_size and not failures:
            waiting = {c: r for r, (_, c) in enumerate(workers) if r not in results}
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} gave no answer in time")
            for connection in ready:
                rank = waiting[connection]
                try:
                    failed, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    workers[rank][0].join(5)
                    failed, value = True, f"it died with exit code {workers[rank][0].exitcode}"
                if failed:
                    failures.append(f"rank {rank} of {world_size}:\n{value}")
                else:
                    results[rank] = value
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world_size)]

    def stop(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._workers)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _serve(connection: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):  # the parent is done
            return
        # What hangs says where, before the parent ends it.
        faulthandler.dump_traceback_later(CALL_SECONDS - 10)
        try:
            store, rank, world_size, function, arguments = pickle.loads(message)
            # Not at the end of a call: one rank's end would cut off another that is still connecting.
            if dist.is_initialized():
                dist.destroy_process_group()
            timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
            file = dist.FileStore(store, world_size)
            file.set_timeout(timeout)
            dist.init_process_group(
                "gloo",
                store=file,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
            torch.manual_seed(0)
            answer = False, function(*arguments)
        except BaseException:
            answer = True, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(answer))


def assert_same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    """Assert that every rank has the same bits."""
    ours = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    for rank, theirs in enumerate(everyone):
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            assert torch.equal(theirs[key], tensor), f"{key} of rank {rank} is another"


def share(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]
