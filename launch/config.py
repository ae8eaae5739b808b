"""The configuration of a run: five sections, each key said once, checked before anything is loaded.

    config = load_config(Path("run.yaml"), ["optim.lr_initial=1e-4", "model.preset=gemnet-dt"])

Model keys carry the names published with GemNet and DimeNet++, so the model block of an OC20 YAML can be pasted in.
DeepSpeed's own settings are not spelt again here: `parallel.deepspeed` refers to DeepSpeed's JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from egnscale.launch.config_file import apply_overrides, explain, known_keys, read_mapping
from egnscale.scaling.combinations import Offload, Precision, Recompute, SecondOrder
from egnscale.scaling.stages import Cut

#: Names that OC20's YAMLs and other programs use for what has another name, or another place, here.
_ELSEWHERE = {
    "activation_checkpointing": "parallel.recompute",
    "amp": "parallel.precision",
    "base_lr": "optim.lr_initial",
    "checkpoint_dir": "task.output",
    "dataset": "data.train",
    "dtype": "parallel.precision",
    "epochs": "optim.max_epochs",
    "eta_min": "optim.scheduler.min_factor",
    "force_loss_weight": "task.force_coefficient",
    "gradient_checkpointing": "parallel.recompute",
    "learning_rate": "optim.lr_initial",
    "lr": "optim.lr_initial",
    "lr_gamma": "optim.scheduler.gamma",
    "lr_milestones": "optim.scheduler.milestones",
    "min_lr": "optim.scheduler.min_factor",
    "num_workers": "data.workers",
    "optimizer": "optim",
    "primary": "task.primary_metric",
    "run_dir": "task.output",
    "src": "data.train",
    "steps": "optim.max_steps",
    "zero_optimization": "parallel.zero",
    "zero_stage": "parallel.zero",
}


def _whole(value: Any) -> Any:
    """1e6 is a whole number; true is none."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _by_name(value: Any) -> Any:
    """`scheduler: cosine` is short for `scheduler: {name: cosine}`."""
    return {"name": value} if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Size = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RadialBasis(_Section):
    """`model.rbf`."""

    name: Literal["gaussian", "spherical_bessel"] = Field(default="gaussian", description="radial basis")


class Envelope(_Section):
    """`model.envelope`."""

    name: Literal["polynomial"] = Field(default="polynomial", description="form of the smooth cutoff")
    exponent: Size = Field(default=5, description="exponent of the polynomial envelope")


class CircularBasis(_Section):
    """`model.cbf`."""

    name: Literal["spherical_harmonics"] = Field(
        default="spherical_harmonics", description="basis in the triplets' angle"
    )


class ModelConfig(_Section):
    """`model`: a preset, hyperparameters, or a preset with some of its hyperparameters replaced.

    What is not given is None here and takes the preset's or the architecture's value when the model is built; where the
    two architectures differ, the defaults below are GemNet's and DimeNet++'s.
    """

    preset: str | None = Field(default=None, description="name of published sizes, such as gemnet-dt")
    name: Literal["gemnet_t", "dimenetplusplus"] | None = Field(
        default=None, description="architecture, where neither preset nor sizes say it; OC20's gp_gemnet_t is gemnet_t"
    )
    num_spherical: Size | None = Field(default=None, description="angular basis functions; 7")
    num_radial: Size | None = Field(default=None, description="radial basis functions; 128 or 6")
    num_blocks: Size | None = Field(default=None, description="interaction blocks")
    emb_size_atom: Size | None = Field(default=None, description="width of atom features")
    emb_size_edge: Size | None = Field(default=None, description="width of edge features")
    emb_size_trip: Size | None = Field(
        default=None, description="width of edge features within the triplet interaction"
    )
    emb_size_bil_trip: Size | None = Field(default=None, description="width after the bilinear layer of the triplets")
    emb_size_rbf: Size | None = Field(default=None, description="width of the embedded radial basis; 16")
    emb_size_cbf: Size | None = Field(default=None, description="width of the embedded circular basis; 16")
    num_before_skip: Size | None = Field(
        default=None, description="residual layers before the first skip connection; 1"
    )
    num_after_skip: Size | None = Field(default=None, description="residual layers after the first skip connection; 2")
    num_concat: Size | None = Field(default=None, description="residual layers after the atoms entered the edges; 1")
    num_atom: Size | None = Field(default=None, description="residual layers of atom features; 3")
    hidden_channels: Size | None = Field(default=None, description="DimeNet++: width of messages")
    out_emb_channels: Size | None = Field(default=None, description="DimeNet++: width of atom features")
    int_emb_size: Size | None = Field(default=None, description="DimeNet++: width within the triplet sum; 64")
    basis_emb_size: Size | None = Field(default=None, description="DimeNet++: width of the embedded bases; 8")
    num_output_layers: Size | None = Field(default=None, description="DimeNet++: layers of atom features; 3")
    angles: Literal["exact", "detached"] | None = Field(
        default=None,
        description="DimeNet++: detached leaves angles out of forces, as OC20's public code does; exact",
    )
    forces: Literal["direct", "conservative", "none"] | None = Field(
        default=None, description="own head, gradient of the energy, or energies alone; direct or conservative"
    )
    num_elements: Size | None = Field(
        default=None, description="atomic numbers 1..num_elements can be embedded; 83 or 94"
    )
    cutoff: Positive | None = Field(default=None, description="neighbours are nearer than this, A; 6.0")
    max_neighbors: Size | None = Field(
        default=None, description="nearest neighbours kept for each atom, null for all; 50"
    )
    symmetrize: Literal["union", "oc20", "none"] | None = Field(
        default=None, description="how directed edges are paired; union or none"
    )
    rbf: Annotated[RadialBasis, BeforeValidator(_by_name)] | None = Field(
        default=None, description="radial basis; gaussian"
    )
    envelope: Annotated[Envelope, BeforeValidator(_by_name)] | None = Field(default=None, description="smooth cutoff")
    cbf: Annotated[CircularBasis, BeforeValidator(_by_name)] | None = Field(default=None, description="circular basis")
    extensive: Flag | None = Field(default=None, description="the energy is a sum over atoms, not their mean; true")
    output_init: Literal["HeOrthogonal", "zeros"] | None = Field(default=None, description="start of the last layers")
    segment_sum: Literal["native", "torch_scatter"] | None = Field(
        default=None, description="kernel of edge sums; native"
    )
    triplet_form: Literal["auto", "harmonic", "block"] | None = Field(
        default=None, description="form of triplet sums; auto"
    )
    activation: Literal["silu"] = Field(default="silu", description="activation function; GemNet scales it")
    otf_graph: Flag = Field(
        default=True, description="accepted from OC20's YAMLs; graphs are always built while reading"
    )
    use_pbc: Flag = Field(default=True, description="accepted from OC20's YAMLs; each structure says what is periodic")
    regress_forces: Flag | None = Field(default=None, description="OC20's name: false is forces: none")
    direct_forces: Flag | None = Field(
        default=None, description="OC20's name: true is forces: direct, false forces: conservative"
    )
    scale_file: None = Field(default=None, description="null; scale factors are fitted before training")

    def hyperparameters(self) -> dict[str, Any]:
        """What was given, under the names of the models' configurations; preset and architecture are not among it."""
        values = {name: getattr(self, name) for name in sorted(self.model_fields_set - _NOT_HYPERPARAMETERS)}
        if self.regress_forces is False:
            values["forces"] = "none"
        elif self.direct_forces is not None:
            values["forces"] = "direct" if self.direct_forces else "conservative"
        if "rbf" in values:
            values["rbf"] = values["rbf"].name
        if "envelope" in values:
            values["envelope_exponent"] = values.pop("envelope").exponent
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _supported(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name
        if value is None and name not in ("preset", "max_neighbors", "scale_file"):
            raise ValueError("leave the key out to have its default")
        if name == "name" and value == "gp_gemnet_t":
            return "gemnet_t"
        if name == "scale_file" and value is not None:
            raise ValueError("scale factors are fitted in-process before training and stored in the checkpoint")
        if name == "use_pbc" and value is False:
            raise ValueError("each structure says itself along which axes it is periodic (pbc)")
        if name == "activation" and value != "silu":
            raise ValueError("only silu is available, GemNet's own choice")
        if name == "cbf" and (value.get("name") if isinstance(value, dict) else value) == "gaussian":
            raise ValueError("triplet sums without triplets need spherical_harmonics")
        return value

    @model_validator(mode="after")
    def _one_kind_of_forces(self) -> ModelConfig:
        given = self.forces
        if given and self.hyperparameters()["forces"] != given:
            raise ValueError(f"forces is {given}, but regress_forces or direct_forces says otherwise; give one of them")
        return self


#: Keys of `model` that no model takes: they choose it, or have the one value that is supported.
_NOT_HYPERPARAMETERS = {
    *("preset", "name", "cbf", "activation", "otf_graph", "use_pbc", "regress_forces", "direct_forces", "scale_file")
}


class DataConfig(_Section):
    """`data`."""

    train: Path = Field(description="data set to train on")
    val: dict[str, Path] = Field(default_factory=dict, description="data set to validate on, or split name: data set")
    limit: Size | None = Field(default=None, description="train on so many structures, the first ones; null for all")
    workers: Count = Field(default=2, description="loader processes per rank; 0 reads in the training process")

    @field_validator("val", mode="before")
    @classmethod
    def _one_split(cls, value: Any) -> Any:
        if value is None:
            return {}
        return {"val": value} if isinstance(value, str | Path) else value


class Normalizer(_Section):
    """Targets are learnt as (value - mean) / std; the mean of forces is zero."""

    energy_mean: Real = Field(description="mean of the energies, eV")
    energy_std: Positive = Field(description="deviation of the energies, eV")
    force_std: Positive = Field(description="deviation of the force components, eV/A")


#: Of each task, its default first.
PRIMARY_METRICS = {
    "s2ef": ("forces_mae", "energy_mae", "energy_forces_within_threshold"),
    "is2re": ("energy_mae", "energy_within_threshold"),
}


class Rollback(_Section):
    """`task.rollback`: what a run does about a loss that leaps up."""

    factor: Annotated[Real, Field(gt=1)] = Field(
        default=5.0, description="a loss above so many times the median is a spike"
    )
    window: Size = Field(default=100, description="last losses whose median is the measure")
    max: Size = Field(default=3, description="rollbacks in the whole run before it stops")


class TaskConfig(_Section):
    """`task`."""

    name: Literal["s2ef", "is2re"] = Field(
        default="s2ef", description="structure to energy and forces, or initial structure to relaxed energy"
    )
    init_from: Path | None = Field(
        default=None, description="checkpoint to start from: its weights, its normalizer, and its model's sizes"
    )
    output: Path = Field(description="directory of the run: logs, plots and checkpoints")
    seed: Count = Field(default=0, description="of weights and shuffling")
    energy_coefficient: NotNegative = Field(default=1.0, description="weight of the energy in the loss")
    force_coefficient: NotNegative = Field(default=100.0, description="weight of the forces in the loss")
    train_on_free_atoms: Flag = Field(default=True, description="the loss leaves out forces on fixed atoms")
    eval_on_free_atoms: Flag = Field(default=True, description="metrics leave out forces on fixed atoms")
    normalizer: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[Normalizer, Tag("given")],
        Discriminator(lambda value: "given" if isinstance(value, dict | Normalizer) else "auto"),
    ] = Field(default="auto", description="auto takes mean and deviation from the training set; or give all three")
    eval_every: Size = Field(default=5000, description="steps between evaluations")
    eval_batches: Size | None = Field(default=None, description="batches per evaluation and split; null for all")
    checkpoint_every: Size | None = Field(
        default=5000, description="steps between checkpoints; null writes none at all"
    )
    keep_last: Size = Field(default=3, description="checkpoints kept besides the best one")
    log_every: Size = Field(default=10, description="steps between rows of the log")
    log_norms: Size | None = Field(
        default=None, description="steps between norms of each layer's outputs, gradients and weights; null for none"
    )
    rollback: Rollback | None = Field(
        default=None,
        description="where the loss leaps up: back to the last good checkpoint, and on with other batches; "
        "null stops where it is not finite",
    )
    scale_factor_batches: Size = Field(
        default=16, description="batches that GemNet's scale factors are fitted on, over all replicas together"
    )
    primary_metric: (
        Literal["forces_mae", "energy_mae", "energy_forces_within_threshold", "energy_within_threshold"] | None
    ) = Field(
        default=None,
        description="chooses the best checkpoint and drives the plateau schedule; forces_mae, for is2re energy_mae",
    )

    @model_validator(mode="after")
    def _metric_of_the_task(self) -> TaskConfig:
        known = PRIMARY_METRICS[self.name]
        if self.primary_metric is not None and self.primary_metric not in known:
            raise ValueError(f"primary_metric is {self.primary_metric}; task {self.name} has {' and '.join(known)}")
        return self

    @model_validator(mode="after")
    def _somewhere_to_go_back_to(self) -> TaskConfig:
        if self.rollback is not None and self.checkpoint_every is None:
            raise ValueError("rollback goes back to a checkpoint, and checkpoint_every null writes none; set a number")
        return self

    @property
    def metric(self) -> str:
        """What chooses the best checkpoint."""
        return self.primary_metric or PRIMARY_METRICS[self.name][0]


class _Warmup(_Section):
    warmup_steps: Count = Field(default=0, description="steps of linear warm-up; 0 for none")
    warmup_factor: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.2, description="fraction of the rate at step 0")


class ConstantScheduler(_Warmup):
    """`optim.scheduler` with name: constant."""

    name: Literal["constant"] = Field(default="constant", description="learning-rate schedule")


class PlateauScheduler(_Warmup):
    """`optim.scheduler` with name: plateau, as OC20's GemNet."""

    name: Literal["plateau"] = Field(default="plateau", description="learning-rate schedule")
    factor: Annotated[Real, Field(gt=0, lt=1)] = Field(default=0.8, description="multiplies the rate on a plateau")
    patience: Count = Field(default=3, description="evaluations without improvement that are tolerated")
    min_factor: Annotated[Real, Field(ge=0, le=1)] = Field(
        default=0.0, description="lowest rate, fraction of lr_initial"
    )


class CosineScheduler(_Warmup):
    """`optim.scheduler` with name: cosine."""

    name: Literal["cosine"] = Field(default="cosine", description="learning-rate schedule")
    min_factor: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.0, description="last rate, fraction of lr_initial")


class MultiStepScheduler(_Warmup):
    """`optim.scheduler` with name: multistep, as OC20's DimeNet++."""

    name: Literal["multistep"] = Field(default="multistep", description="learning-rate schedule")
    milestones: list[Size] = Field(description="steps at which the rate is multiplied by gamma")
    gamma: Annotated[Real, Field(gt=0, le=1)] = Field(default=0.1, description="multiplies the rate at each milestone")


class ExponentialScheduler(_Warmup):
    """`optim.scheduler` with name: exponential, as the paper's fine-tuning for IS2RE."""

    name: Literal["exponential"] = Field(default="exponential", description="learning-rate schedule")
    gamma: Annotated[Real, Field(gt=0, le=1)] = Field(default=0.95, description="multiplies the rate after each epoch")


def _named_schedule(value: Any) -> Any:
    value = _by_name(value)
    return {"name": "plateau", **value} if isinstance(value, dict) else value


class OptimConfig(_Section):
    """`optim`: AdamW and the length of the run."""

    batch_size: Size = Field(
        description="structures per replica and micro-batch; ranks that share graphs are one replica"
    )
    eval_batch_size: Size | None = Field(default=None, description="the same in evaluation; null for batch_size")
    gradient_accumulation: Size = Field(default=1, description="micro-batches per step")
    max_steps: Size | None = Field(default=None, description="length of the run in steps; or give max_epochs")
    max_epochs: Size | None = Field(default=None, description="length of the run in epochs; or give max_steps")
    lr_initial: Positive = Field(description="learning rate after warm-up, before the schedule lowers it")
    weight_decay: NotNegative = Field(
        description="a number, always written out; 0.01 reproduces the published OC20 runs, whose missing or zero "
        "value left AdamW's default 0.01 in force"
    )
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="AdamW's two decay rates"
    )
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    amsgrad: Flag = Field(default=False, description="AMSGrad variant of AdamW, as OC20's GemNet")
    scheduler: Annotated[
        Annotated[
            ConstantScheduler | PlateauScheduler | CosineScheduler | MultiStepScheduler | ExponentialScheduler,
            Field(discriminator="name"),
        ],
        BeforeValidator(_named_schedule),
    ] = Field(
        default_factory=PlateauScheduler,
        description="constant, plateau, cosine, multistep or exponential, with its settings",
    )
    ema_decay: Annotated[Real, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the averaged weights that are evaluated; null for none; OC20 0.999"
    )
    clip_grad_norm: Positive | None = Field(
        default=None, description="largest gradient norm; null for no clipping; OC20 10"
    )
    load_balancing: Literal["edges", "atoms", "none"] = Field(default="edges", description="what replicas share evenly")

    @model_validator(mode="after")
    def _one_length(self) -> OptimConfig:
        if (self.max_steps is None) == (self.max_epochs is None):
            given = "neither" if self.max_steps is None else "both"
            raise ValueError(f"{given} of max_steps and max_epochs given; expected exactly one, the other null")
        return self


class ParallelConfig(_Section):
    """`parallel`: how the run is spread."""

    graph: Size = Field(default=1, description="ranks that share each graph; consecutive ones, of one node if they fit")
    pipe: Size = Field(
        default=1, description="pipeline stages; a step's micro-batches (optim.gradient_accumulation) go through them"
    )
    stage_cut: Cut = Field(
        default="cost",
        description="what the heaviest stage has as little of as can be: cost (foretold time), parameters, or uniform "
        "(layers)",
    )
    zero: Annotated[Whole, Field(ge=0, le=3)] = Field(default=0, description="DeepSpeed's ZeRO stage, 0..3")
    recompute: Recompute = Field(
        default="none",
        description="what is made again in the backward pass: none, selective (what is cheap) or block (every layer)",
    )
    precision: Precision = Field(default="fp32", description="precision of matrix products")
    offload: Offload | None = Field(
        default=None,
        description="what is kept in host memory (optimizer; parameters: these too) or on a disk (nvme: both); "
        "null: what the DeepSpeed configuration says",
    )
    second_order: Literal["auto"] | SecondOrder = Field(
        default="auto",
        description="how conservative forces are trained; auto is the faster one that fits, and "
        "under ZeRO-3 reverse_over_forward",
    )
    check_memory: Flag = Field(
        default=True, description="foretell what a rank needs, and do not start what would not fit"
    )
    deepspeed: str | None = Field(
        default=None, description="name of a preset in ds_configs or path of a DeepSpeed JSON"
    )


class RunConfig(_Section):
    """Everything that defines a run."""

    model: ModelConfig = Field(description="what is trained")
    data: DataConfig = Field(description="what it is trained and validated on")
    task: TaskConfig = Field(description="loss, metrics, where results go and how often")
    optim: OptimConfig = Field(description="optimizer, schedule and length of the run")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="how the run is spread")

    def to_yaml(self) -> str:
        """YAML that loads to an equal configuration, defaults written out; of the model only what was given."""
        values = self.model_dump(mode="json")
        values["model"] = self.model.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(values, sort_keys=False)

    def dump(self, path: Path) -> None:
        """Write `to_yaml()`."""
        path.write_text(self.to_yaml(), encoding="utf-8")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, put the overrides in their places, and check everything.

    Args:
        path: None starts from nothing, so that the overrides are all.
        overrides: `section.key=value`, with YAML values; the last one wins.

    Raises:
        ValueError: one line naming the file, the key, what was given and what is expected.
    """
    values = apply_overrides(read_mapping(path), overrides)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        key, text = explain(error, values, known_keys(RunConfig), _ELSEWHERE)
        guilty = [override for override in overrides if f"{key}.".startswith(override.partition("=")[0].strip() + ".")]
        source = f"override {guilty[-1]!r}" if guilty else str(path or "configuration")
        raise ValueError(f"{source}: {text}") from None
