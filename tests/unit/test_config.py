"""The run's configuration: what it takes, what it refuses, and in which words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from egnscale.launch.config import ModelConfig, RunConfig, load_config
from egnscale.launch.config_file import known_keys
from egnscale.launch.schedules import SCHEDULES, build_schedule
from egnscale.models import model_config
from egnscale.models.gemnet import GemNetConfig

REQUIRED: dict[str, Any] = {
    "model": {"preset": "gemnet-dt"},
    "data": {"train": "data/train"},
    "task": {"output": "runs/a"},
    "optim": {"batch_size": 2, "lr_initial": 5e-4, "weight_decay": 0.01, "max_steps": 100},
}

#: The model block of OC20's gemnet-dT.yml, but for its scale_file.
OC20_MODEL = """
name: gemnet_t
num_spherical: 7
num_radial: 128
num_blocks: 3
emb_size_atom: 512
emb_size_edge: 512
emb_size_trip: 64
emb_size_rbf: 16
emb_size_cbf: 16
emb_size_bil_trip: 64
num_before_skip: 1
num_after_skip: 2
num_concat: 1
num_atom: 3
cutoff: 6.0
max_neighbors: 50
rbf:
  name: gaussian
envelope:
  name: polynomial
  exponent: 5
cbf:
  name: spherical_harmonics
extensive: True
otf_graph: False
output_init: HeOrthogonal
activation: silu
regress_forces: True
direct_forces: True
"""


#: The model block of OC20's dimenetpp.yml.
OC20_DIMENET = """
name: dimenetplusplus
hidden_channels: 192
out_emb_channels: 192
num_blocks: 3
cutoff: 6.0
num_radial: 6
num_spherical: 7
num_before_skip: 1
num_after_skip: 2
num_output_layers: 3
regress_forces: True
use_pbc: True
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path


def _changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**REQUIRED, **{name: {**REQUIRED.get(name, {}), **values} for name, values in sections.items()}}


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.model.hyperparameters() == {}
    assert config.data.val == {}
    assert (config.task.energy_coefficient, config.task.force_coefficient) == (1.0, 100.0)
    assert config.task.normalizer == "auto"
    assert config.optim.scheduler.name == "plateau"
    assert config.parallel.graph == config.parallel.pipe == 1


def test_a_published_model_block_can_be_pasted_in() -> None:
    for block, preset in ((OC20_MODEL, "gemnet-dt"), (OC20_DIMENET, "dimenet++")):
        given = ModelConfig.model_validate(yaml.safe_load(block))
        assert model_config(None, name=given.name, **given.hyperparameters()) == model_config(preset)


def test_published_names_for_forces() -> None:
    for given, forces in (
        ({"direct_forces": False}, "conservative"),
        ({"direct_forces": True}, "direct"),
        ({"regress_forces": False}, "none"),
        ({"forces": "conservative", "direct_forces": False}, "conservative"),
    ):
        values = ModelConfig.model_validate({"preset": "gemnet-dt", **given}).hyperparameters()
        assert model_config("gemnet-dt", **values).forces == forces
    assert ModelConfig.model_validate({"name": "gp_gemnet_t"}).name == "gemnet_t"


def test_every_hyperparameter_can_be_given() -> None:
    """The section and the model's own configuration must not drift apart."""
    given = ModelConfig.model_validate(
        {
            **yaml.safe_load(OC20_MODEL),
            "num_elements": 90,
            "symmetrize": "oc20",
            "segment_sum": "native",
            "triplet_form": "block",
        }
    ).hyperparameters()
    assert set(given) == {field.name for field in fields(GemNetConfig)}


def test_only_what_is_given_replaces_a_preset(file: Path) -> None:
    config = load_config(file, ["model.num_blocks=5", "model.max_neighbors=null", "model.rbf.name=spherical_bessel"])
    expected = {"num_blocks": 5, "max_neighbors": None, "rbf": "spherical_bessel"}
    assert config.model.hyperparameters() == expected
    assert model_config(config.model.preset, **expected).emb_size_edge == 512


def test_overrides(file: Path) -> None:
    config = load_config(
        file,
        [
            "optim.lr_initial=1e-4",
            "optim.max_steps=1e6",
            "optim.max_steps=2e3",
            "optim.eps=1E-07",
            "optim.betas=[0.9, 0.95]",
        ]
        + ["data.val={id: a, ood: b}", "data.val.ood=c", "optim.scheduler=cosine", "task.output=a=b"],
    )
    optim = config.optim
    assert (optim.lr_initial, optim.max_steps, optim.eps, optim.betas) == (1e-4, 2000, 1e-7, (0.9, 0.95))
    assert config.data.val == {"id": Path("a"), "ood": Path("c")}
    assert optim.scheduler.name == "cosine"
    assert config.task.output == Path("a=b")
    assert load_config(file, ["data.val=v"]).data.val == {"val": Path("v")}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.max_neighbors=null", "model.envelope.exponent=6", "model.cutoff=5"],
        ["optim.max_steps=null", "optim.max_epochs=3", "optim.ema_decay=0.999", "optim.clip_grad_norm=10"],
        ["optim.scheduler={name: multistep, milestones: [10, 20], warmup_steps: 5}", "optim.eps=1e-12"],
        ["optim.scheduler={name: cosine, min_factor: 0.01}", "data.val={id: a, ood: b}"],
        ["task.normalizer={energy_mean: -0.75, energy_std: 2.9, force_std: 2.9}", "task.eval_batches=4"],
    ],
)
def test_round_trip(file: Path, tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(file, overrides)
    config.dump(tmp_path / "again.yaml")
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert again.model.hyperparameters() == config.model.hyperparameters()
    assert again.to_yaml() == config.to_yaml()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_take_what_the_configuration_holds(file: Path, name: str) -> None:
    milestones = ", milestones: [10]" if name == "multistep" else ""
    values = load_config(file, [f"optim.scheduler={{name: {name}{milestones}}}"]).optim.scheduler.model_dump()
    assert build_schedule(values.pop("name"), 100, **values).factor(0) == 1.0


@pytest.mark.parametrize(
    "override, message",
    [
        # Unknown keys
        ("optim.learning_rate=1e-4", "unknown key optim.learning_rate; did you mean optim.lr_initial?"),
        ("optim.force_coefficient=3", "unknown key optim.force_coefficient; did you mean task.force_coefficient?"),
        ("optim.num_workers=3", "unknown key optim.num_workers; did you mean data.workers?"),
        ("model.num_block=3", "unknown key model.num_block; did you mean model.num_blocks?"),
        ("optimm={}", "unknown key optimm; did you mean optim?"),
        ("task.zzz=1", "unknown key task.zzz"),
        ("optim.scheduler={name: cosine, patience: 3}", "scheduler.patience has no meaning for optim.scheduler cosine"),
        # Types and ranges
        ("model.cutoff=-1", "model.cutoff is -1; expected a number greater than 0"),
        ("model.cutoff=.nan", "model.cutoff is nan; expected a finite number"),
        ("model.cutoff=true", "model.cutoff is true: expected a number"),
        ("model.num_blocks=0", "model.num_blocks is 0; expected a number greater than 0"),
        ("model.num_blocks=null", "model.num_blocks is null: leave the key out to have its default"),
        ("model.rbf=fourier", "model.rbf is 'fourier'; expected 'gaussian' or 'spherical_bessel'"),
        ("model.extensive=1", "model.extensive is 1; expected a valid boolean"),
        ("model=3", "model is 3; expected a section with keys"),
        ("optim.lr_initial=fast", "optim.lr_initial is 'fast'; expected a valid number"),
        ("optim.lr_initial=.inf", "optim.lr_initial is inf; expected a finite number"),
        ("optim.batch_size=2.5", "optim.batch_size is 2.5; expected a valid integer"),
        ("optim.batch_size=true", "optim.batch_size is true: expected a whole number"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1 is 1.5; expected a number less than 1"),
        ("optim.ema_decay=1", "optim.ema_decay is 1; expected a number less than 1"),
        ("optim.scheduler=cosin", "optim.scheduler.name is 'cosin'; expected 'constant', 'plateau', 'cosine'"),
        ("optim.weight_decay=null", "optim.weight_decay is null; expected a valid number"),
        ("data.train=5", "data.train is 5; expected a path"),
        ("parallel.zero=4", "parallel.zero is 4; expected a number less than or equal to 3"),
        ("task.normalizer=ato", "task.normalizer is 'ato'; expected 'auto'"),
        ("task.normalizer={energy_mean: 1}", "task.normalizer.energy_std is missing"),
        # What this version does not do
        ("parallel.pipe=0", "parallel.pipe is 0; expected a number greater than 0 (pipeline stages"),
        ("parallel.stage_cut=layers", "parallel.stage_cut is 'layers'; expected 'cost', 'parameters' or 'uniform'"),
        ("model.cbf=gaussian", "model.cbf is 'gaussian': triplet sums without triplets need spherical_harmonics"),
        ("model.cbf={name: gaussian}", "model.cbf: triplet sums without triplets need spherical_harmonics"),
        ("model.forces=conservativ", "model.forces is 'conservativ'; expected 'direct', 'conservative' or 'none'"),
        ("model={forces: direct, direct_forces: false}", "forces is direct, but regress_forces or direct_forces says"),
        ("model.scale_file=a.json", "model.scale_file is 'a.json': scale factors are fitted in-process"),
        # Overrides
        ("optim.batch_size", "expected section.key=value"),
        ("optim.batch_size.x=3", "batch_size is 2 and has no key x"),
        ("model.cutoff=[", "not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(file, [override])
    text = str(caught.value)
    assert message in text
    assert override in text, "the override is to blame, not the file"
    assert "\n" not in text
    assert "Input" not in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    "values, message",
    [
        (_changed(optim={"max_steps": None}), "optim: neither of max_steps and max_epochs given; expected exactly one"),
        (_changed(optim={"max_epochs": 3}), "optim: both of max_steps and max_epochs given; expected exactly one"),
        (_changed(optim={"lr": 1e-4}), "unknown key optim.lr; did you mean optim.lr_initial?"),
        (
            {**REQUIRED, "optim": {"batch_size": 2, "lr_initial": 1e-4, "weight_deca": 0, "max_steps": 1}},
            "unknown key optim.weight_deca; did you mean optim.weight_decay? (and 1 more)",
        ),
        (_changed(data={"val": {"id": 5}}), "data.val.id is 5; expected a path"),
        ({**REQUIRED, "task": None}, "task is null; expected a section with keys"),
        ({"model": {"preset": "gemnet-dt"}}, "data is missing (what it is trained and validated on) (and 2 more)"),
        ([1, 2], "holds [1, 2]; expected sections with keys"),
        ({}, "model is missing"),
    ],
)
def test_mistakes_name_the_file(file: Path, values: Any, message: str) -> None:
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_weight_decay_must_be_said(file: Path) -> None:
    file.write_text(yaml.safe_dump({**REQUIRED, "optim": {"batch_size": 2, "lr_initial": 1e-4, "max_steps": 1}}))
    with pytest.raises(ValueError, match=r"optim.weight_decay is missing \(.*0.01 reproduces the published OC20 runs"):
        load_config(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {preset: a\n", "line 2: not valid YAML"),
        ("optim:\n  batch_size: 2\n  batch_size: 4\n", "line 3: not valid YAML: 'batch_size' stands twice"),
    ],
)
def test_broken_yaml_names_the_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}, {message}")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")


def test_a_number_is_a_number_in_the_file_too(file: Path) -> None:
    file.write_text(file.read_text().replace("0.0005", "5e-4"))
    assert "5e-4" in file.read_text()
    assert load_config(file).optim.lr_initial == 5e-4


def test_without_a_file() -> None:
    config = load_config(
        None,
        ["model.preset=gemnet-dt", "data.train=a", "task.output=b", "optim.batch_size=1", "optim.lr_initial=1e-3"]
        + ["optim.weight_decay=0", "optim.max_epochs=1"],
    )
    assert config.optim.max_steps is None
    with pytest.raises(ValueError, match=r"^configuration: model is missing"):
        load_config(None)


def test_every_key_is_described() -> None:
    described = known_keys(RunConfig)
    assert len(described) > 60
    assert [key for key, text in described.items() if not text or "\n" in text] == []


def test_examples_load() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
    for path in examples:
        load_config(path)
