"""The training loop.

Everything that a step depends on follows from the step's number and what a checkpoint holds: the batch comes from
(seed, epoch, position), the learning rate from the schedule's state. That is what makes a resumed run continue as if it
had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from egnscale.data.sampler import BalancedBatchSampler
from egnscale.launch.config import RunConfig
from egnscale.launch.evaluation import evaluate_is2re, evaluate_s2ef
from egnscale.launch.loading import make_loader, open_labelled, sizes_for_balance, validation_splits
from egnscale.launch.norms import LayerNorms, Norm
from egnscale.launch.optimizers import make_optimizer
from egnscale.launch.pipelining import StagedModel
from egnscale.launch.planning import Forecast, Planner, available_memory, settle
from egnscale.launch.reporting import RunLog, TrainingProgress, plot_norms, plot_training
from egnscale.launch.resuming import check_resumed, find_resumed
from egnscale.launch.run_files import (
    RUN,
    WEIGHTS,
    TrainedRun,
    read_run,
    read_trained,
    recorded_model,
    run_model,
    run_record,
)
from egnscale.launch.schedules import build_schedule
from egnscale.launch.spikes import ROLLBACKS, SpikeGuard
from egnscale.launch.stage_costs import bounds_of, stage_table
from egnscale.launch.steps import Computation, Read, StagedComputation, WholeModel, count
from egnscale.launch.tasks import IS2RE, S2EF, Normalizer
from egnscale.launch.troubles import Troubles
from egnscale.launch.weights import open_weights, save_weights
from egnscale.models import AtomModel, build_model, count_parameters
from egnscale.models.layered import Blocks, LayeredModel
from egnscale.models.scale_factors import unfitted
from egnscale.models.stage import only_layers
from egnscale.scaling.agreement import check_agreement, run_facts
from egnscale.scaling.checkpoint import (
    forget_newer,
    save_checkpoint,
    verify_checkpoint,
    write_text,
)
from egnscale.scaling.collectives import added
from egnscale.scaling.combinations import Combination
from egnscale.scaling.ds_config import complete_ds_config, offload_of, preset_name, read_ds_config
from egnscale.scaling.ema import ExponentialMovingAverage
from egnscale.scaling.engine import (
    Engine,
    World,
    computes_in_fp16,
    gather_over_ranks,
    once,
    sharded_layers,
    sum_over_ranks,
)
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.layout import Mesh
from egnscale.scaling.memory import peak_memory
from egnscale.scaling.pipeline import Pipeline, StageTime, bubble, stage_imbalance
from egnscale.scaling.planner import MACHINES
from egnscale.scaling.recompute import set_recompute

#: Columns of the log that only fp16 has.
FP16_COLUMNS = ("loss_scale", "skipped_steps")


class StepSums(NamedTuple):
    """What an optimizer step went through, over all ranks."""

    loss: float
    structures: float
    atoms: float
    edges: float
    gradient_norm: float  #: before clipping
    norms: list[Norm]  #: of each layer, where they are due
    skipped: bool = False  #: fp16 has left it out
    trouble: str = ""  #: why the step must be undone, where a rollback is to follow


class Trainer:
    """One training run on this rank.

    Args:
        config: the whole run.
        world: this process among its peers.
        ds_config: path or preset name of a DeepSpeed JSON, in place of `parallel.deepspeed`.
        resume: continue from the run's latest checkpoint, if it has one.
        say: prints a line for people (rank 0 only).

    Raises:
        ValueError: for whatever the user can put right.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        ds_config: str | None = None,
        resume: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.world, self.say = config, world, say
        parallel = config.parallel
        self.ds_name = ds_config or parallel.deepspeed or preset_name(parallel.zero, parallel.offload)
        ds = read_ds_config(self.ds_name)
        if world.size > 1:
            facts = run_facts(config.model_dump(mode="json"), ds, device=world.device.type, resume=resume)
            check_agreement(facts, gather_over_ranks)
        self.mesh = Mesh.of_world(world.device, graph=config.parallel.graph, pipe=config.parallel.pipe)
        self.directory = Path(config.task.output)
        self.checkpoints = self.directory / "checkpoints"
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None
        self.best: dict[str, float] = {}
        self.evaluations: dict[str, dict[str, float]] = {}
        rollback = config.task.rollback
        self.guard = SpikeGuard(**rollback.model_dump()) if rollback else SpikeGuard(math.inf, 1, 0)
        self.checkpoint_due = False

        resumed = find_resumed(self.directory, self.checkpoints, resume=resume)
        start = None  # what a new run starts from
        if config.task.init_from is not None and resumed is None:
            start = read_trained(config.task.init_from)
        # Once a run goes on, its own checkpoints say what it started from: that may be gone.
        before = start.config if start is not None else recorded_model(resumed[1], resumed[0]) if resumed else None
        self.model_config = run_model(config, before)
        self.combination = self._combination(ds)
        self._check_combination()
        elements, task = self.model_config.num_elements, config.task.name
        self.train_store = open_labelled(config.data.train, elements, task, config.data.limit)
        self.val_stores = {name: open_labelled(path, elements, task) for name, path in self._val_splits().items()}
        if resumed is not None:
            check_resumed(*resumed, self.model_config, self._layout(), self.config.optim.batch_size)
        self.normalizer = self._normalizer(start, resumed)
        self.sampler = self._sampler(self.train_store, config.optim.batch_size, shuffle=True)
        self.total_steps = self._total_steps()
        schedule = config.optim.scheduler.model_dump()
        self.schedule = build_schedule(
            schedule.pop("name"), self.total_steps, steps_per_epoch=self._steps_per_epoch(), **schedule
        )

        ds = complete_ds_config(
            ds,
            zero=parallel.zero,
            precision=parallel.precision,
            gradient_accumulation=config.optim.gradient_accumulation,
            clip_grad_norm=config.optim.clip_grad_norm,
            offload=parallel.offload,
            swap=self.directory / "swap",
        )
        with torch.device("meta"):
            self.num_parameters = count_parameters(build_model(self.model_config))
        self.bounds = self._cut() if parallel.pipe > 1 else []
        self.forecast: Forecast | None = None
        if parallel.check_memory:
            self._foretell()
        torch.manual_seed(config.task.seed)  # the same weights on every rank
        with self._build_parts(ds):
            model = build_model(self.model_config)
        self.mesh.name_layers(model.layers)
        set_recompute(model, parallel.recompute, self.mesh.graph_group)
        self.objective = self._objective(model)
        if self.model_config.forces == "conservative" and parallel.zero == 3:
            flatten_layers(model)
        self.engine, self.computation = self._spread(model, ds)
        self.troubles = Troubles(
            *(config, self.objective, self.engine, self.mesh, self.computation, self.guard, self.checkpoints)
        )
        if start is not None:
            self._start_from(start.path / WEIGHTS)
        elif resumed is None:
            self._fit_scale_factors()
        self.norms = LayerNorms(self.objective, model, self.engine) if config.task.log_norms else None
        decay = config.optim.ema_decay
        self.ema = ExponentialMovingAverage(self.engine, decay) if decay is not None else None
        if resumed is not None:
            self._load(*resumed)
            self.say(f"resumed {resumed[0]} at step {self.step}")
        else:
            once(self._make_directory)

    # Setting up

    def _cut(self) -> list[int]:
        """Where layers are cut into stages; the same on all ranks. Collective."""
        optim = self.config.optim
        size = (self.mesh.layout, self.combination, optim.batch_size, optim.gradient_accumulation)
        bounds: list[int] = []

        def decide() -> None:
            costs = self._planner.costs(*size)
            how = self.config.parallel.stage_cut
            bounds.extend(bounds_of(costs, self.mesh.layout.pipe, how))
            self.say(stage_table(costs, bounds, how))

        once(decide)
        return gather_over_ranks(bounds)[0]

    def _combination(self, ds: dict[str, Any]) -> Combination:
        parallel = self.config.parallel
        return Combination(
            forces=self.model_config.forces,
            second_order=parallel.second_order,
            pipe=parallel.pipe,
            zero=parallel.zero,
            recompute=parallel.recompute,
            precision=parallel.precision,
            offload=parallel.offload or offload_of(ds),
            fp16_device=computes_in_fp16(),
        )

    @cached_property
    def _planner(self) -> Planner:
        """One for the cut and the forecast: it keeps what it has read and traced."""
        machine = MACHINES["cpu" if self.world.device.type == "cpu" else "h100"]
        return Planner(self.config, self.model_config, machine, self.train_store, ds_config=self.ds_name)

    def _foretell(self) -> None:
        """Choose what the planner chooses; stop what would not fit, the same on all ranks."""
        planner = self._planner
        available = min(gather_over_ranks(available_memory(self.world.device)))
        self.combination, self.forecast = settle(planner, self.mesh.layout, self.combination, available, self.say)

    def _check_combination(self) -> None:
        forces, name = self.model_config.forces, self.config.task.name
        if (reason := self.combination.why_not()) is not None:
            raise ValueError(reason)
        task = self.config.task
        kept = (
            task.checkpoint_every is not None or task.init_from is not None or self.config.optim.ema_decay is not None
        )
        if self.combination.offload == "nvme" and kept:
            raise ValueError(
                "state on NVMe can be neither saved, averaged nor read yet; set task.checkpoint_every, task.init_from "
                "and optim.ema_decay to null, or parallel.offload to parameters"
            )
        if forces == "none" and name == "s2ef":
            raise ValueError("task s2ef trains forces, and model.forces is none; choose direct or conservative")
        if forces != "none" and name == "is2re":
            raise ValueError(f"task is2re trains energies alone, and model.forces is {forces}; leave it out")

    def _build_parts(self, ds: dict[str, Any]) -> AbstractContextManager[None]:
        """Within, a model is built of which this rank never has more than its part and one layer."""
        parallel, stage = self.config.parallel, self.mesh.stage
        if parallel.pipe > 1:
            return only_layers(self.bounds[stage], self.bounds[stage + 1], self.bounds[-1])
        return sharded_layers(ds, LayeredModel, Blocks) if parallel.zero == 3 else nullcontext()

    def _spread(self, model: AtomModel, ds: dict[str, Any]) -> tuple[Engine, Computation]:
        """What makes steps of this rank's part of the model."""
        stages, stage = self.config.parallel.pipe, self.mesh.stage
        if stages == 1:
            engine = Engine(self.objective, make_optimizer(self.config.optim, self.objective)[0], ds, self.world)
            return engine, WholeModel(self.objective, engine, self.mesh)
        layers = model.layers[self.bounds[stage] : self.bounds[stage + 1]]
        optimizer, spare = make_optimizer(self.config.optim, self.objective, every_group=True)
        pipeline = Pipeline(self.objective, [*layers, spare], optimizer, ds, self.world, stages)
        staged = StagedModel(model, self.bounds, self.mesh, pipeline)
        return pipeline, StagedComputation(self.objective, pipeline, self.mesh, staged)

    def _objective(self, model: torch.nn.Module) -> S2EF | IS2RE:
        task = self.config.task
        if task.name == "is2re":
            return IS2RE(model, self.normalizer)
        return S2EF(
            model,
            self.normalizer,
            energy_coefficient=task.energy_coefficient,
            force_coefficient=task.force_coefficient,
            free_atoms_only=task.train_on_free_atoms,
            second_order=self.combination.chosen_second_order,
        )

    def _make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / ROLLBACKS).unlink(missing_ok=True)
        write_text(self.directory / "config.yaml", self.config.to_yaml())

    def _val_splits(self) -> dict[str, Path]:
        """The stores to validate on; a directory of `val_*` stores stands for all of them."""
        splits: dict[str, Path] = {}
        for name, path in self.config.data.val.items():
            found = validation_splits(path, self.config.task.name)
            splits |= found if len(found) > 1 or name == "val" else {name: next(iter(found.values()))}
        return splits

    def _layout(self) -> dict[str, Any]:
        """How the run uses the ranks, and what the order of the data and the averages depend on (`resuming`)."""
        optim, parallel = self.config.optim, self.config.parallel
        return {
            "ranks": self.world.size,
            "replicas": self.mesh.layout.data,
            "pipe": parallel.pipe,
            "zero": parallel.zero,
            "precision": parallel.precision,
            "global_batch": optim.batch_size * self.mesh.layout.data,
            "gradient_accumulation": optim.gradient_accumulation,
            "load_balancing": optim.load_balancing,
            "seed": self.config.task.seed,
            "structures": len(self.train_store),
            "ema_decay": optim.ema_decay,
            "amsgrad": optim.amsgrad,
        }

    def _normalizer(self, start: TrainedRun | None, resumed: tuple[Path, dict[str, Any]] | None) -> Normalizer:
        if resumed is not None:
            return Normalizer(**resumed[1]["normalizer"])
        given = self.config.task.normalizer
        if given != "auto":
            chosen = Normalizer(given.energy_mean, given.energy_std, given.force_std)
        elif start is not None:
            chosen = start.normalizer  # its last layers learnt to give energies in these units
        else:
            label = "energy_relaxed" if self.config.task.name == "is2re" else "energy"
            chosen = Normalizer.from_statistics(self.train_store.metadata["statistics"], label)
        if self.model_config.forces == "conservative" and chosen.force_std != chosen.energy_std:
            whose = "task.normalizer" if given != "auto" else "the normalizer of task.init_from"
            raise ValueError(
                f"{whose} has energy_std {chosen.energy_std} and force_std {chosen.force_std}; conservative forces are "
                "the gradient of the energy, so both must be the same (task.normalizer sets them)"
            )
        return chosen

    def _sampler(self, store: Any, batch_size: int, *, shuffle: bool) -> BalancedBatchSampler:
        return BalancedBatchSampler(
            sizes_for_balance(store, self.config.optim.load_balancing),
            batch_size,
            num_replicas=self.mesh.layout.data,
            rank=self.mesh.data_rank,
            seed=self.config.task.seed,
            shuffle=shuffle,
            accumulation=self.config.optim.gradient_accumulation if shuffle else 1,
        )

    def _total_steps(self) -> int:
        optim = self.config.optim
        if optim.max_steps is not None:
            return optim.max_steps
        assert optim.max_epochs is not None
        return math.ceil(optim.max_epochs * len(self.sampler) / optim.gradient_accumulation)

    def _steps_per_epoch(self) -> int:
        return max(1, round(len(self.sampler) / self.config.optim.gradient_accumulation))

    def _fit_scale_factors(self) -> None:
        if not unfitted(self.objective.model):
            return
        loader = self._loader(self.train_store, self.sampler, workers=0)
        batches = islice(loader, max(1, self.config.task.scale_factor_batches // self.mesh.layout.data))
        graphs = [self.mesh.place(graph) for graph, _ in batches]
        factors = self.computation.fit_scale_factors(graphs)
        self.say(f"fitted {len(factors)} scale factors on {len(graphs)} batches per replica")

    def _start_from(self, path: Path) -> None:
        """Take the weights of a trained model, but for what only that one has for forces.

        Scale factors too, the unfitted ones among them: they are part of what the weights were trained for.
        """
        shapes, buffers = self.engine.shapes(), dict(self.objective.named_buffers())
        with open_weights(path) as weights:
            known = shapes | {name: buffer.shape for name, buffer in buffers.items()}
            weights.leave_out(name for name in weights.shapes if ".force." in name and f"model.{name}" not in known)
            weights.check_fit({name.removeprefix("model."): shape for name, shape in known.items()})
            self.engine.set_weights((name, weights[name.removeprefix("model.")]) for name in shapes)
            for name, buffer in buffers.items():
                buffer.copy_(weights[name.removeprefix("model.")])
        self.say(f"starts with the weights of {path.parent}")

    # Checkpoints

    def _save(self) -> None:
        """Write a checkpoint of this step; the best one so far is kept besides the last few."""
        record = run_record(
            self.model_config,
            self.normalizer,
            step=self.step,
            seconds=self.seconds,
            loss=self.loss,
            schedule=self.schedule.state_dict(),
            best=self.best,
            evaluations=self.evaluations,
            spikes=self.guard.state(),
            loss_scaling=self.engine.loss_scaling() if self.config.parallel.precision == "fp16" else {},
            layout=self._layout(),
            batches_per_epoch=len(self.sampler),
            config=self.config.model_dump(mode="json"),
        )

        def write(directory: Path) -> None:
            self.engine.save(directory)
            weights = self.ema.whole() if self.ema else self.engine.whole_masters()
            tensors = chain(weights, self.objective.named_buffers())
            shapes = self.engine.shapes() | {name: b.shape for name, b in self.objective.named_buffers()}
            save_weights(
                directory / WEIGHTS,
                ((name.removeprefix("model."), tensor) for name, tensor in tensors),
                {name.removeprefix("model."): shape for name, shape in shapes.items()},
                write=self.world.is_main,
            )
            if self.world.is_main:
                write_text(directory / RUN, json.dumps(record, indent=1))

        save_checkpoint(
            self.checkpoints,
            _checkpoint_name(self.step),
            write,
            is_main=self.world.is_main,
            agree=gather_over_ranks,
            keep_last=self.config.task.keep_last,
            keep={_checkpoint_name(self.best["step"])} if self.best else set(),
        )

    def _load(self, checkpoint: Path, run: dict[str, Any]) -> None:
        batches, replicas = run["batches_per_epoch"], self.mesh.layout.data
        if len(self.sampler) != batches:
            # Only the last, smaller batch of an epoch can differ: it is dropped if a replica would get nothing.
            rest = len(self.train_store) % (self.config.optim.batch_size * replicas)
            raise ValueError(
                f"cannot resume {checkpoint}: an epoch had {batches} batches on {run['layout']['replicas']} replicas "
                f"and would have {len(self.sampler)} on {replicas}, since its last one has {rest} structures; "
                f"start {'at most' if len(self.sampler) < batches else 'more than'} {rest} replicas"
            )
        self.engine.load(checkpoint)
        if self.ema:
            with open_weights(checkpoint / WEIGHTS) as weights:
                self.ema.load_whole(lambda name: weights[name.removeprefix("model.")])
        self.schedule.load_state_dict(run["schedule"])
        self.step, self.seconds, self.loss = run["step"], run["seconds"], run["loss"]
        self.best, self.evaluations = run["best"], run["evaluations"]
        if self.config.parallel.precision == "fp16":
            self.engine.load_loss_scaling(run.get("loss_scaling", {}))
        if "spikes" in run:
            self.guard.load(run["spikes"], self.directory, self.step)

    # Training

    def run(self, progress: bool = True) -> dict[str, Any]:
        """Train to the end; returns what `egnscale train --json` prints."""
        config, world = self.config, self.world
        log = self._open_log()
        self.say(
            f"{self.num_parameters:,} parameters, {len(self.train_store):,} structures, "
            f"ZeRO-{config.parallel.zero}, {config.parallel.precision}, {self.total_steps} steps"
        )
        self.say(self.mesh.layout.table() if world.size > 1 else str(self.mesh.layout))
        batches = self._batches()
        with TrainingProgress(
            self.total_steps,
            enabled=progress and world.is_main,
            start=self.step,
            log_every=config.task.log_every,
        ) as bar:
            while self.step < self.total_steps:
                started = time.perf_counter()
                self.engine.set_lr(config.optim.lr_initial * self.schedule.factor(self.step))
                sums = self._train_step(batches)
                trouble = sums.trouble or self.troubles.of_spike(self.step + 1, sums.loss)
                if trouble:
                    self._roll_back(trouble)
                    if log:
                        log.close()
                        log = self._open_log()
                    batches = self._batches()
                    continue
                self.step, self.loss = self.step + 1, sums.loss
                self.guard.add(sums.loss)
                if self.troubles.count_skipped(self.step, skipped=sums.skipped) and self.ema:
                    self.ema.update()
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                last = self.step == self.total_steps
                bar.update(self.step, loss=sums.loss, atoms_per_second=sums.atoms / elapsed)
                exchanged = self.mesh.traffic()
                logged = self.step % config.task.log_every == 0 or last
                of_stages = self._stage_times() if logged else []
                if log and logged:
                    log.train(
                        self.step,
                        epoch=self._epoch(),
                        loss=sums.loss,
                        lr=config.optim.lr_initial * self.schedule.factor(self.step - 1),
                        grad_norm=sums.gradient_norm,
                        structures_per_second=sums.structures / elapsed,
                        atoms_per_second=sums.atoms / elapsed,
                        edges_per_second=sums.edges / elapsed,
                        exchanged_mb=added(exchanged.values()).bytes / 1e6,
                        exchange_wait=added(exchanged.values()).seconds,
                        seconds=self.seconds,
                        **self._pipe_columns(of_stages),
                        **self._fp16_columns(),
                    )
                    log.stages(self.step, of_stages)
                    log.exchanges(self.step, exchanged)
                if log:
                    log.norms(self.step, sums.norms)
                improved = (self.step % config.task.eval_every == 0 or last) and self._evaluate(log, all_splits=last)
                every = config.task.checkpoint_every
                self.checkpoint_due |= every is not None and self.step % every == 0
                due = self.checkpoint_due and not self.guard.uneasy
                if every is not None and (due or improved or last):
                    self._save()
                    self.checkpoint_due = False
        if log:
            log.close()
            plot_training(self.directory)
            plot_norms(self.directory)
        for name, value in self._fp16_columns().items():
            self.say(f"fp16: {name.replace('_', ' ')} {value:g}")
        peaks = gather_over_ranks(peak_memory(world.device))
        self.say(f"peak memory: {', '.join(f'{peak / 2**30:.2f}' for peak in peaks)} GiB")
        return {
            "output": str(self.directory),
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "parameters": self.num_parameters,
            "peak_memory": peaks,
            "evaluations": self.evaluations,
        }

    def _open_log(self) -> RunLog | None:
        if not self.world.is_main:
            return None
        return RunLog(self.directory, resume_step=self.step, columns=(*self._pipe_columns([]), *self._fp16_columns()))

    def _stage_times(self) -> list[StageTime]:
        """What the stages of the first replica did in the last step; none where there is one stage. Collective."""
        mine, layout = self.computation.stage_time(), self.mesh.layout
        if mine is None:
            return []
        every = gather_over_ranks(mine)
        return [every[layout.rank(pipe=stage)] for stage in range(layout.pipe)]

    def _pipe_columns(self, times: Sequence[StageTime]) -> dict[str, float]:
        if self.config.parallel.pipe == 1:
            return {}
        return {"bubble": bubble(times), "stage_imbalance": stage_imbalance(times)}

    def _fp16_columns(self) -> dict[str, float]:
        if self.config.parallel.precision != "fp16":
            return {}
        return dict(zip(FP16_COLUMNS, (self.engine.loss_scale, self.engine.skipped_steps), strict=True))

    def _epoch(self) -> float:
        return self._position() / len(self.sampler)

    def _position(self) -> int:
        """Micro-batches of this replica that are behind it, those that rollbacks passed over among them."""
        return self.step * self.config.optim.gradient_accumulation + self.guard.skipped_batches

    def _batches(self) -> Iterator[Read]:
        """Batches without end, from where the run stands."""
        epoch, position = divmod(self._position(), len(self.sampler))
        while True:
            self.sampler.set_position(epoch, position)
            yield from self._loader(self.train_store, self.sampler)
            epoch, position = epoch + 1, 0

    def _loader(self, store: Any, sampler: BalancedBatchSampler, workers: int | None = None) -> Any:
        workers = self.config.data.workers if workers is None else workers
        return make_loader(store, sampler, self.model_config, self.mesh, workers, self.config.task.name)

    def _train_step(self, batches: Iterator[Read]) -> StepSums:
        """One optimizer step."""
        self.mesh.traffic()  # what evaluation exchanged is no part of a step
        self.computation.stage_time()  # nor is what it computed
        self.engine.train()
        every = self.config.task.log_norms
        norms = self.norms if every and (self.step + 1) % every == 0 else None
        skipped = self.engine.skipped_steps
        read = list(islice(batches, self.config.optim.gradient_accumulation))
        counts = count(read, self.objective, self.mesh)
        computed = self.computation.backward(read, counts, norms)
        trouble = self.troubles.of_losses(self.step + 1, computed, read)
        of_layers = norms.read() if norms else []
        if self.config.parallel.precision == "fp16":  # DeepSpeed leaves bad steps out, and lowers the loss scale
            self.engine.step()
            gradient_norm = self.engine.gradient_norm()
        else:
            gradient_norm = self.engine.whole_gradient_norm()
            trouble = trouble or self.troubles.of_gradient(self.step + 1, gradient_norm, read)
            self.engine.step()
        loss = sum_over_ranks(torch.stack([one.loss.double() for one in computed]).mean()) / self.world.size
        return StepSums(
            float(loss),
            counts.structures,
            counts.atoms,
            counts.edges,
            gradient_norm,
            of_layers,
            skipped=self.engine.skipped_steps > skipped,
            trouble=trouble,
        )

    # Going back

    def _roll_back(self, reason: str) -> None:
        """Go back to a good checkpoint, and past all batches that have been read. Collective."""
        guard, spike, position = self.guard, self.step + 1, self._position()
        rollbacks = guard.rollbacks
        checkpoints = self.troubles.whole_checkpoints()
        steps = [int(path.name.removeprefix("step_")) for path in checkpoints]
        to = guard.choose(steps)
        checkpoint = checkpoints[steps.index(to)]
        once(lambda: verify_checkpoint(checkpoint))
        self._load(checkpoint, read_run(checkpoint))
        accumulation = self.config.optim.gradient_accumulation
        past = position + accumulation - to * accumulation - sum(one["skipped_batches"] for one in rollbacks)
        guard.rollbacks = [
            *rollbacks,
            {"step": spike, "to_step": to, "skipped_batches": past, "reason": reason},
        ]

        def remember() -> None:
            guard.write(self.directory)
            forget_newer(self.checkpoints, checkpoint.name)

        once(remember)
        self.checkpoint_due = False
        self.troubles.skipped_in_a_row = 0
        self.say(
            f"{reason}: back to {checkpoint}, and on with the batches after it ({past} per replica are passed over); "
            f"rollback {len(guard.rollbacks)} of at most {guard.max}"
        )

    # Evaluation

    def _evaluate(self, log: RunLog | None, *, all_splits: bool) -> bool:
        """Evaluate the (averaged) weights: the first split while training, all of them at the end.

        Returns whether the first split's primary metric is the best so far.
        """
        improved = False
        names = list(self.val_stores)
        self.engine.train(False)
        for name in names if all_splits else names[:1]:
            metrics = self._evaluate_split(name, None if all_splits else self.config.task.eval_batches)
            self.evaluations[name] = {"step": self.step, **metrics}
            if log:
                log.evaluation(self.step, name, metrics)
            # Only like is compared with like: a part of the split is not the whole.
            if name == names[0] and (not all_splits or self.config.task.eval_batches is None):
                metric = self.config.task.metric
                # Errors are better low; a fraction within a threshold is better high.
                value = -metrics[metric] if metric.endswith("within_threshold") else metrics[metric]
                self.schedule.observe(value)
                improved = value < self.best.get("value", math.inf)
                if improved:
                    self.best = {"value": value, "step": self.step}
        self.engine.train()
        return improved

    def _evaluate_split(self, name: str, max_batches: int | None) -> dict[str, float]:
        store, optim = self.val_stores[name], self.config.optim
        sampler = self._sampler(store, optim.eval_batch_size or optim.batch_size, shuffle=False)

        def evaluate() -> dict[str, float]:
            how: dict[str, Any] = {
                "place": self.mesh.place,
                "max_batches": max_batches,
                "at_once": self.computation.at_once,
                "reduce": self.mesh.sum_over_data,
            }
            what = (self.computation.predict, self._loader(store, sampler), self.normalizer, self.world.device)
            if self.config.task.name == "is2re":
                return evaluate_is2re(
                    *what, energy_mean=self.train_store.metadata["statistics"]["energy_relaxed"]["mean"], **how
                )
            return evaluate_s2ef(*what, free_atoms_only=self.config.task.eval_on_free_atoms, **how)

        if self.ema is None:
            return evaluate()
        with self.ema.applied():
            return evaluate()


def _checkpoint_name(step: float) -> str:
    return f"step_{int(step):08d}"
