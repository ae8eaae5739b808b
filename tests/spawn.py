"""Run a function in several processes that form one gloo process group.

    spawn(2, check, argument)       # check(world, argument) in each of two processes; returns [result of rank 0, 1]

The function must be importable (top level of a test file). A failing rank fails the test with its traceback; a hanging
one is ended after `timeout` seconds.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def spawn(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = (function.__code__.co_filename, function.__name__)
    processes = [context.Process(target=_run, args=(rank, size, port, where, args, results)) for rank in range(size)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < size:
            try:
                rank, result, problem = results.get(timeout=1)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise AssertionError(f"a process ended with exit code {dead[0]}") from None
                if time.monotonic() > deadline:
                    raise AssertionError(f"ranks {set(range(size)) - set(found)} hang after {timeout} s") from None
                continue
            if problem:
                raise AssertionError(f"rank {rank}:\n{problem}")
            found[rank] = pickle.loads(result)
    finally:
        for process in processes:
            if len(found) < size:
                process.kill()
            process.join(30)
    return [found[rank] for rank in range(size)]


def _run(rank: int, size: int, port: int, where: tuple[str, str], args: tuple, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        from egnscale.scaling.engine import start_world

        torch.set_num_threads(1)
        spec = importlib.util.spec_from_file_location("spawned", where[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        world = start_world()
        result = getattr(module, where[1])(world, *args)
        # As bytes: a tensor sent by itself lives in shared memory that ends with this process.
        results.put((rank, pickle.dumps(result), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
