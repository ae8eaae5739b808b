"""A rank that fails, dies or freezes is named by the others, although they are stuck in a collective.

    watch = Watch.start(rank, size, host, "egnscale train")
    watch.stop()                 # or watch.fail("no space left on device"): every other rank prints that and ends

Two daemon threads per rank. The first one talks to the process group's key-value store over a connection of its own.
Every PERIOD it raises this rank's counter, reads the counter of the nearest lower rank that has not ended (a ring) and
the verdict, one key for all: three small operations, 6,000 per second for 4096 ranks. Whoever finds a rank silent, or
fails, writes the verdict if nobody has; whoever reads it prints it and ends the process. The second thread sees to it
that the store answers the first one, for an operation on a frozen store waits without limit.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

#: Seconds between two heartbeats of a rank.
PERIOD = 2.0
#: Seconds without a heartbeat after which a rank is given up.
SILENT = 15.0
#: Seconds in which every rank that lives reads a verdict.
HEARD = 1.5 * PERIOD
#: The verdict when rank 0, which holds the store, has ended normally.
OVER = "over"

_watches = itertools.count()


class Watch:
    """This rank's two threads; `fail` and `stop` end them."""

    def __init__(self, store: dist.Store, rank: int, size: int, host: str, name: str, silent: float) -> None:
        self.rank, self.size, self.host, self.name, self.silent = rank, size, host, name, silent
        self._store = store
        self._answers = 0
        self._neighbour, self._heard, self._silence, self._asked = (rank - 1) % size, "", 0.0, time.monotonic()
        self._ending = threading.Event()
        self._failure, self._doubtful = "", False
        self._verdict = ""
        # torch's own rule: the launcher's agent holds the store under torchrun, rank 0 otherwise.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._holds_store = rank == 0 and not agent
        self._holder = "the torchrun agent" if agent else "rank 0"
        self._talker = threading.Thread(target=self._talk, name="watch", daemon=True)

    @classmethod
    def start(cls, rank: int, size: int, host: str, name: str, silent: float = SILENT) -> Watch:
        """Begin to watch; `name` starts the line that is printed when another rank fails."""
        store = _get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        assert isinstance(store, dist.TCPStore)
        # The main thread may be blocked in an operation, which locks its connection.
        own = dist.TCPStore(store.host, store.port, wait_for_workers=False, timeout=timedelta(seconds=30))
        prefix = f"egnscale/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_watches)}"
        watch = cls(dist.PrefixStore(prefix, own), rank, size, host, name, silent)
        watch._holder += f" ({store.host})"
        watch._talker.start()
        threading.Thread(target=watch._check_answers, name="watch of the store", daemon=True).start()
        return watch

    def fail(self, message: str, *, doubtful: bool = False) -> None:
        """Tell the others why this rank ends; a doubtful failure may be another rank's, which is looked for first."""
        self._failure, self._doubtful = message, doubtful
        self._end()

    def stop(self) -> None:
        """Say goodbye."""
        self._end()

    def verdict(self) -> str:
        """What is known to have failed, or nothing."""
        return "" if self._verdict == OVER else self._verdict

    def _end(self) -> None:
        self._ending.set()
        self._talker.join(timeout=SILENT)  # no longer, where the store does not answer

    # The first thread. Only it uses the store.

    def _talk(self) -> None:
        try:
            while not self._ending.is_set():
                self._beat()
                self._judge_neighbour()
                self._verdict = self._read("verdict")
                if self._verdict == OVER:
                    self._linger(0)
                    return
                if self._verdict:
                    self._speak(self._verdict)
                    self._linger(HEARD)
                    os._exit(1)
                self._ending.wait(PERIOD)
            self._last_word()
        except RuntimeError:
            self._verdict = f"{self._holder} is gone: its key-value store closed the connection"
            if not self._ending.is_set():
                self._speak(self._verdict)
                os._exit(1)

    def _beat(self, word: str = "") -> None:
        self._store.set(f"beat/{self.rank}", f"{word or self._answers} {self.host}")

    def _read(self, key: str, default: str = "") -> str:
        """A key's value, set to the default where it has none: unlike `get`, this never waits for the key."""
        value = self._store.compare_set(key, "", default).decode()
        self._answers += 1
        return value

    def _judge_neighbour(self) -> None:
        if self._neighbour == self.rank:
            return
        word, now = self._read(f"beat/{self._neighbour}"), time.monotonic()
        if word.startswith("ended"):
            self._neighbour, self._heard, self._silence = (self._neighbour - 1) % self.size, "", 0.0
        elif word != self._heard:
            self._heard, self._silence = word, 0.0
        else:
            # A longer pause was this rank's own: stopped, or the whole machine was.
            self._silence += min(now - self._asked, PERIOD)
        self._asked = now
        if word and self._silence > self.silent:
            self._read("verdict", f"{_who(self._neighbour, word)} died or froze: no heartbeat for {self.silent:.0f} s")
        elif self._silence > 4 * self.silent:  # imports from a busy file system take their time
            self._read("verdict", f"{_who(self._neighbour, word)} has not started after {4 * self.silent:.0f} s")

    def _last_word(self) -> None:
        if self._failure:
            mine = f"{_who(self.rank, f'- {self.host}')} failed: {self._failure}"
            self._verdict = self._read("verdict", (self._find_culprit() if self._doubtful else "") or mine)
            self._linger(HEARD)
            return
        self._beat("ended")
        if self._holds_store:
            self._verdict = self._read("verdict", OVER)
        self._linger(HEARD if self._holds_store else 0)

    def _linger(self, seconds: float) -> None:
        """Count this rank as one that knows, and wait until all do: the store ends with the rank that holds it."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):  # the store is gone: who held it has waited for all
            known = self._store.add("known", 1)
            while known < self.size and time.monotonic() < until:
                time.sleep(0.25)
                known = self._store.add("known", 0)

    def _find_culprit(self) -> str:
        """Which rank broke a collective: by the verdict, or those without a heartbeat. One rank looks for all."""
        looking = self._read("looking", f"{self.rank}") == f"{self.rank}"
        before = self._words() if looking else {}
        until = time.monotonic() + (2.5 if looking else 4) * PERIOD
        while time.monotonic() < until:
            self._beat()
            if verdict := self._read("verdict"):
                return verdict
            time.sleep(0.25 * PERIOD)
        lost = {rank: word for rank, word in (self._words() if looking else {}).items() if word == before[rank]}
        ended = {rank: word for rank, word in lost.items() if word.startswith("ended")}
        dead = {rank: word for rank, word in lost.items() if rank not in ended}
        names = ", ".join(_who(rank, word) for rank, word in itertools.islice((dead or ended).items(), 8))
        return names and f"{names} {'died or froze: no heartbeat' if dead else 'ended before the others'}"

    def _words(self) -> dict[int, str]:
        return {rank: self._read(f"beat/{rank}") for rank in range(self.size) if rank != self.rank}

    def _speak(self, text: str) -> None:
        # Past a progress bar, which hides the cursor and may have replaced sys.stderr.
        shown = "\n\x1b[?25h" if sys.__stderr__ and sys.__stderr__.isatty() else ""
        print(f"{shown}{self.name} [rank {self.rank}]: {text}", file=sys.__stderr__, flush=True)
        sys.stdout.flush()

    # The second thread.

    def _check_answers(self) -> None:
        """Count the seconds, asleep ones left out, in which the first thread got no answer."""
        seen, waited = -1, 0
        while self._talker.is_alive() and not self._ending.is_set():
            time.sleep(1)
            waited, seen = (waited + 1 if self._answers == seen else 0), self._answers
            if waited > self.silent:
                self._speak(f"{self._holder} froze: its key-value store does not answer for {self.silent:.0f} s")
                os._exit(1)


def _who(rank: int, word: str) -> str:
    """`rank 3 (HOST)`, from a heartbeat `17 HOST`."""
    return f"rank {rank}" + (f" ({word.split(' ', 1)[1]})" if word else "")
