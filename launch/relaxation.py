"""Relax many structures with a model: a batch that is kept full until there are none left.

Structures are drawn from a queue; each leaves the batch as soon as it is done, and the next one takes its place. A step
builds the graph of the whole batch in one call, evaluates the model once and moves every structure by its own L-BFGS.

What is notable:
* A batch is served by one or more *lanes*, threads with an optimizer of their own that draw from the same queue. On a
  CPU there is one lane for each of torch's threads, and each lane computes with one: structures are independent, so
  they spread over cores better than the rows of a matrix product do. On a GPU there are two, so that one builds graphs
  while the other computes.
* What does not fit into memory is cut in halves and tried again; one structure that does not fit by itself is reported
  and left out. A structure whose forces are not finite is reported, and the others go on.
* No result depends on batch size or lanes, beyond the rounding of the model's sums.

Lengths A, energies eV, forces eV/A.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.data.sampler import deal
from egnscale.launch.lbfgs import LBFGS, LBFGSOptions
from egnscale.launch.loading import graph_spec
from egnscale.launch.run_files import TrainedModel, together
from egnscale.launch.tasks import Normalizer
from egnscale.models import AtomModel

Status = Literal["converged", "step limit", "failed"]

#: Features (edges x width) that a CPU lane holds at once: matrices of a few MB, which stay in a core's cache. Larger
#: batches are slower there: 64 slabs at once take 1.4 times as long per slab as 6 do.
CPU_FEATURES = 350_000

NO_FORCES = "the model predicts no forces, so it cannot relax a structure; use one that was trained on s2ef"


@dataclass(frozen=True)
class RelaxOptions:
    """When a relaxation ends, and how it steps."""

    fmax: float = 0.02  #: eV/A; converged when no free atom feels more. OC20's later releases; its first never stopped
    steps: int = 200  #: at most, counted for each structure
    optimizer: LBFGSOptions = field(default_factory=LBFGSOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.fmax < float("inf"):
            raise ValueError(f"fmax is {self.fmax} eV/A; it must not be negative")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must not be negative")


class Frame(NamedTuple):
    """One evaluated step of one structure, N atoms."""

    positions: np.ndarray  #: (N, 3) float64, A
    energy: float  #: eV
    forces: np.ndarray  #: (N, 3) float64, eV/A, those of fixed atoms included


@dataclass(frozen=True, eq=False)
class Relaxed:
    """How the relaxation of one structure ended."""

    index: int  #: of the structure in what was given
    sample: Sample  #: as it was given
    positions: np.ndarray  #: (N, 3) float64, A; the last ones with a finite energy and forces, or the initial ones
    energy: float | None  #: eV, there; None where nothing could be evaluated
    forces: np.ndarray | None  #: (N, 3) float64, eV/A, there
    steps: int  #: taken to get there
    status: Status
    reason: str = ""  #: why it failed
    frames: tuple[Frame, ...] = ()  #: every step, the start and the end included, where they were asked for

    @property
    def largest_force(self) -> float:
        """max |F| over free atoms, eV/A; NaN where there are no forces."""
        if self.forces is None:
            return float("nan")
        return float(np.linalg.norm(self.forces[~self.sample.fixed], axis=1).max(initial=0.0))


class Samples(Protocol):
    """Structures by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample: ...


class Evaluate(Protocol):
    """Structures -> energies (B,) in eV and forces (V, 3) in eV/A, float64 on the CPU. Called by several threads."""

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Potential:
    """A trained model as energies and forces of structures.

    Raises:
        ValueError: when called, if the model predicts no forces or a structure holds an element that it does not know.
    """

    model: AtomModel
    normalizer: Normalizer
    collate: Collate
    device: torch.device

    @classmethod
    def of(cls, trained: TrainedModel, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Potential:
        """The model of a checkpoint, moved to a device and a precision."""
        model = trained.model.to(device, dtype)
        collate = Collate(graph_spec(model.config), model.config.num_elements, dtype)
        return cls(model, trained.normalizer, collate, torch.device(device))

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        energy, forces = self.predict(samples)
        if forces is None:
            raise ValueError(NO_FORCES)
        return energy, forces

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """As calling it, but with None for the forces of a model that has none."""
        predict, at_once = together(self.model)
        sizes = np.array([sample.num_atoms for sample in samples])
        parts = (
            [part.tolist() for part in deal(sizes, min(at_once, len(samples)))]
            if at_once > 1
            else [list(range(len(samples)))]
        )
        graphs = [self.collate([samples[index] for index in part])[0].to(self.device) for part in parts]
        try:
            predictions = [self.normalizer.physical(found) for found in predict(graphs)]
        except (MemoryError, RuntimeError) as error:
            if at_once == 1 or not _is_lack_of_memory(error):
                raise
            # One process tries with fewer structures; the stages of a pipeline would have to agree to.
            raise ValueError("memory has run out on a stage of the pipeline; lower --batch-size") from error
        # Back in the order of the samples.
        back = np.argsort(np.concatenate(parts), kind="stable")
        # Detached: forces that are a gradient may come with the graph that made them.
        energies = torch.cat([found.energy.detach().double().cpu() for found in predictions])[back]
        if predictions[0].forces is None:
            return energies, None
        of_samples = [
            rows
            for part, found in zip(parts, predictions, strict=True)
            for rows in found.forces.detach().double().cpu().split(sizes[part].tolist())  # type: ignore[union-attr]
        ]
        return energies, torch.cat([of_samples[index] for index in back])

    @property
    def has_forces(self) -> bool:
        """Whether the model predicts forces."""
        return self.model.config.forces != "none"

    @property
    def lanes(self) -> int:
        """How many threads serve a batch best. All stages of a pipeline must come to the same one."""
        if together(self.model)[1] > 1:
            return 1
        return torch.get_num_threads() if self.device.type == "cpu" else 2

    @property
    def max_atoms(self) -> int | None:
        """How many atoms a lane evaluates at once; None: as many as there are."""
        if self.device.type != "cpu":
            return None
        return max(1, CPU_FEATURES // (_width(self.model) * (self.collate.spec.max_neighbors or 50)))


def _width(model: nn.Module) -> int:
    """Features of an edge, by the name that the model's configuration has for them."""
    config = getattr(model, "config", None)
    return next((getattr(config, name) for name in ("emb_size_edge", "hidden_channels") if hasattr(config, name)), 128)


def relax(
    samples: Samples,
    evaluate: Evaluate,
    options: RelaxOptions | None = None,
    *,
    order: Sequence[int] | None = None,
    batch_size: int = 64,
    max_atoms: int | None = None,
    lanes: int = 1,
    keep_frames: bool = False,
    observe: Callable[[int], None] = lambda evaluated: None,
) -> Iterator[Relaxed]:
    """Relax structures; each is yielded as soon as it is done.

    Args:
        samples: read one by one, when there is room.
        order: which of them, and in what order they are begun (None: all, as they come). Similar sizes together, and
            large ones first, waste the least.
        batch_size: structures under way at the same time, in all lanes together.
        max_atoms: atoms evaluated at once in a lane (None: no limit); a larger structure goes by itself.
        lanes: threads, each with a share of the batch.
        keep_frames: hand out every step.
        observe: called by the lanes with the number of structures evaluated, after every step.

    Raises:
        ValueError: for arguments out of range; and whatever `evaluate` raises except for lack of memory.
    """
    if batch_size < 1 or lanes < 1 or (max_atoms is not None and max_atoms < 1):
        raise ValueError(f"batch_size, lanes and max_atoms must be at least 1, not {batch_size}, {lanes}, {max_atoms}")
    waiting = _Queue(samples, range(len(samples)) if order is None else order)
    lanes = max(1, min(lanes, batch_size, len(waiting)))
    turns = _Turns(lanes)

    def lane() -> _Lane:
        settings = options or RelaxOptions()
        return _Lane(
            waiting, evaluate, settings, turns, -(-batch_size // lanes), max_atoms, lanes, keep_frames, observe
        )

    if lanes == 1:
        yield from lane().run()
    else:
        yield from _in_threads([lane() for _ in range(lanes)])


# ------------------------------------------------------------------------------------------------------------ lanes


class _Queue:
    """Structures that wait, handed out to whoever asks."""

    def __init__(self, samples: Samples, order: Sequence[int]) -> None:
        self._samples = samples
        self._order = deque(order)
        self._next: tuple[int, Sample] | None = None  # read, but not taken
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._order) + (self._next is not None)

    def take(self, structures: int, atoms: float, alone: bool, lanes: int) -> list[tuple[int, Sample]]:
        """At most so many structures and atoms; at least one where the lane has none. No more than a lane's share."""
        taken: list[tuple[int, Sample]] = []
        with self._lock:
            share = max(1, -(-len(self) // lanes))
            while len(taken) < min(structures, share) and len(self):
                if self._next is None:
                    index = self._order.popleft()
                    self._next = (index, self._samples[index])
                atoms -= self._next[1].num_atoms
                if atoms < 0 and (taken or not alone):
                    break
                taken.append(self._next)
                self._next = None
        return taken


class _Turns:
    """Lanes evaluate side by side, except where one needs all memory for itself."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._places = threading.Semaphore(lanes)
        self._exclusive = threading.Lock()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._places:
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._exclusive:
            for _ in range(self._lanes):
                self._places.acquire()
            try:
                yield
            finally:
                self._places.release(self._lanes)


@dataclass(eq=False)
class _Member:
    """A structure under way."""

    index: int
    sample: Sample
    positions: np.ndarray  # (N, 3), what is evaluated next
    free: np.ndarray  # (F,) indices of the atoms that move
    steps: int = 0
    last: Frame | None = None  # the last finite one
    frames: list[Frame] = field(default_factory=list)

    def end(self, status: Status, reason: str = "") -> Relaxed:
        last = self.last
        return Relaxed(
            index=self.index,
            sample=self.sample,
            positions=self.sample.positions if last is None else last.positions,
            energy=None if last is None else last.energy,
            forces=None if last is None else last.forces,
            steps=max(0, self.steps - (status == "failed" and last is not None)),
            status=status,
            reason=reason,
            frames=tuple(self.frames),
        )


class _Lane:
    def __init__(
        self,
        waiting: _Queue,
        evaluate: Evaluate,
        options: RelaxOptions,
        turns: _Turns,
        capacity: int,
        max_atoms: int | None,
        lanes: int,
        keep_frames: bool,
        observe: Callable[[int], None],
    ) -> None:
        self.waiting, self.evaluate, self.options, self.turns = waiting, evaluate, options, turns
        self.capacity, self.lanes, self.keep_frames, self.observe = capacity, lanes, keep_frames, observe
        self.max_atoms = float("inf") if max_atoms is None else float(max_atoms)
        self.members: list[_Member] = []
        self.optimizer = LBFGS(options.optimizer)

    def run(self) -> Iterator[Relaxed]:
        while True:
            self._fill()
            if not self.members:
                return
            yield from self._advance()

    def _fill(self) -> None:
        room = self.max_atoms - sum(member.sample.num_atoms for member in self.members)
        taken = self.waiting.take(self.capacity - len(self.members), room, not self.members, self.lanes)
        new = [
            _Member(index, sample, sample.positions.copy(), np.flatnonzero(~sample.fixed)) for index, sample in taken
        ]
        self.optimizer.extend([torch.from_numpy(member.positions[member.free]) for member in new])
        self.members += new

    def _advance(self) -> Iterator[Relaxed]:
        """Evaluate all members, let those go that are done, and move the others."""
        failed = self._evaluate_all()
        if failed:
            ended = [member.end("failed", reason) for member, reason in failed.items()]
            self._leave([member not in failed for member in self.members])
            yield from ended
        if not self.members:
            return
        moving = [member.last.forces[member.free] for member in self.members if member.last is not None]
        forces = self.optimizer.pack(torch.from_numpy(np.concatenate(moving)))
        converged = (self.optimizer.largest_force(forces) <= self.options.fmax).tolist()
        stay = [
            not done and member.steps < self.options.steps for done, member in zip(converged, self.members, strict=True)
        ]
        ended = [
            member.end("converged" if done else "step limit")
            for done, member, stays in zip(converged, self.members, stay, strict=True)
            if not stays
        ]
        if ended:
            self._leave(stay)
            forces = forces[torch.tensor(stay)][:, : self.optimizer.real.shape[1]]
        if self.members:
            moves = self.optimizer.step(forces).numpy()
            for member, move in zip(self.members, moves, strict=True):
                member.positions = member.positions.copy()
                member.positions[member.free] += move[: len(member.free)]
                member.steps += 1
        yield from ended

    def _leave(self, stay: list[bool]) -> None:
        self.optimizer.keep(torch.nonzero(torch.tensor(stay)).flatten())
        self.members = [member for member, stays in zip(self.members, stay, strict=True) if stays]

    def _evaluate_all(self) -> dict[_Member, str]:
        """Give every member its next frame; returns those that cannot have one, and why."""
        failed: dict[_Member, str] = {}
        groups = deque(self._groups(self.members))
        while groups:
            group = groups.popleft()
            fits, result = self._try(group, self.turns.together())
            if not fits and len(group) > 1:
                # From now on no batch is as large; what the other lanes hold at the moment may have been the reason.
                self.max_atoms = max(1, sum(member.sample.num_atoms for member in group) // 2)
                middle = len(group) // 2
                groups.extendleft([group[middle:], group[:middle]])
                continue
            if not fits:
                fits, result = self._try(group, self.turns.alone())
            if not fits:
                failed[group[0]] = f"{group[0].sample.num_atoms} atoms do not fit into memory"
                continue
            assert result is not None
            failed |= self._take_in(group, *result)
            self.observe(len(group))
        return failed

    def _groups(self, members: list[_Member]) -> list[list[_Member]]:
        """Members in their order, in groups of at most `max_atoms`."""
        groups: list[list[_Member]] = []
        room = 0.0
        for member in members:
            room -= member.sample.num_atoms
            if room < 0 or not groups:
                groups.append([])
                room = self.max_atoms - member.sample.num_atoms
            groups[-1].append(member)
        return groups

    def _try(
        self, group: list[_Member], turn: contextlib.AbstractContextManager[None]
    ) -> tuple[bool, tuple[Tensor, Tensor] | None]:
        """Whether memory sufficed, and what came out."""
        try:
            with turn:
                return True, self.evaluate([replace(member.sample, positions=member.positions) for member in group])
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
        # Here, and not above: the exception holds on to the frames, and through them to what was allocated.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return False, None

    def _take_in(self, group: list[_Member], energy: Tensor, forces: Tensor) -> dict[_Member, str]:
        failed: dict[_Member, str] = {}
        parts = np.split(forces.numpy(), np.cumsum([member.sample.num_atoms for member in group])[:-1])
        for member, value, part in zip(group, energy.tolist(), parts, strict=True):
            if not (np.isfinite(value) and np.isfinite(part).all()):
                failed[member] = f"the model's energy or forces are not finite after {member.steps} steps"
                continue
            member.last = Frame(member.positions, value, part)
            if self.keep_frames:
                member.frames.append(member.last)
        return failed


def _is_lack_of_memory(error: BaseException) -> bool:
    """On a CPU, torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _in_threads(lanes: list[_Lane]) -> Iterator[Relaxed]:
    """Run lanes side by side; what they yield, as it comes. The first error of any ends all of them."""
    results: queue.SimpleQueue[Relaxed | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    # torch's number of threads is one for each thread that asks: the caller's stays as it is.
    threads_each = max(1, torch.get_num_threads() // len(lanes))

    def work(lane: _Lane) -> None:
        try:
            torch.set_num_threads(threads_each)
            for result in lane.run():
                results.put(result)
                if stop.is_set():
                    return
            results.put(None)
        except BaseException as error:
            results.put(error)

    evaluate = lanes[0].evaluate

    def unless_stopped(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        if stop.is_set():
            raise _Stopped
        return evaluate(samples)

    workers = []
    for number, lane in enumerate(lanes):
        lane.evaluate = unless_stopped
        workers.append(threading.Thread(target=work, args=(lane,), name=f"lane {number}", daemon=True))
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stop.set()
        for worker in workers:
            worker.join()


class _Stopped(Exception):
    """Another lane failed, or nobody wants the results any more."""
