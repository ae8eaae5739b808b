"""What makes a long job restartable: a lock, a note of what the job is, and workers that die with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from egnscale.data.files import replacing

#: One thread for each worker: more would only compete, and could sum in another order.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def compare(there: Mapping[str, Any], wanted: Mapping[str, Any], what: str, advice: str) -> None:
    """Raise a ValueError that names the first option that differs."""
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(f"{what} with {name} {there.get(name)}, not {value}; {advice}")


def claim(folder: Path, wanted: dict[str, Any], out: Path) -> None:
    """Write down what this job is, or check that it is the one begun here."""
    file = folder / "options.json"
    if file.exists():
        compare(
            json.loads(file.read_text()), wanted, f"{out} was begun", "go on with the same, or remove it and begin anew"
        )
    else:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1))


@contextlib.contextmanager
def lock(folder: Path, out: Path, work: str = "building") -> Iterator[None]:
    """Held by the job at work; the system releases it when that process ends, however it ends."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is {work} {out}; wait for it, or end it") from None
        yield


def run_in_pool(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, name: Callable[[Any], str]
) -> Generator[Any, None, None]:
    """Call `function(*job)` for each job in `workers` processes; yields results as they come, in any order.

    Args:
        name: what an error message calls a job.

    Raises:
        OSError: if a worker was killed.
        ValueError, OSError: as `function` raises them; other errors as RuntimeError, with the job's name.
    """
    if not jobs:
        return
    # Spawned, also when there is one: every worker is the same fresh process, whatever the caller has loaded.
    with _environment(_ONE_THREAD):
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
        )
        futures = {pool.submit(function, *job): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise OSError(
                        "a worker was killed (out of memory?); run the same command to go on, or use fewer workers"
                    ) from None
                except (ValueError, OSError):
                    raise  # these name the job or the file already
                except Exception as error:
                    raise RuntimeError(f"{name(futures[future])}: {type(error).__name__}: {error}") from error
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker waiting for work does not notice that it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
