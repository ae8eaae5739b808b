"""Public OC20 checkpoints: import, use, export and import again; what cannot be imported is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oc20_files
import pytest
import torch
from oc20_files import LAYOUTS, MEAN, STD, checkpoint, public_state, reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import make_dataset, samples, slab

from egnscale.data.batch import build_graph
from egnscale.data.sample import Sample
from egnscale.launch import Calculator
from egnscale.launch.cli import main
from egnscale.launch.loading import graph_spec
from egnscale.launch.run_files import load_trained
from egnscale.launch.tasks import Normalizer
from egnscale.models import PRESETS, AtomModel, Prediction, build_model
from egnscale.models.oc20_names import (
    ARCHITECTURES,
    public_order,
    recognise,
    scale_factor_module,
    to_our_name,
    to_our_names,
    to_public_name,
    to_public_names,
)
from egnscale.models.scale_factors import unfitted

GEMNET, DIMENET = ARCHITECTURES
both = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Any, name: str = "checkpoint.pt", **options: Any) -> Path:
        path = tmp_path / name
        torch.save(content, path, **options)
        return path

    return write


def imported(path: Path, *options: str) -> Path:
    """Import through the command, beside the file."""
    out = path.with_suffix(".imported")
    assert main(["checkpoint", "import", str(path), str(out), *options, "--json"]) == 0
    return out


def refused(capfd: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line with which a command fails, having written nothing."""
    capfd.readouterr()
    assert main(["checkpoint", *map(str, words)]) == 1
    err = capfd.readouterr().err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("egnscale checkpoint: ")
    assert "--debug shows" not in lines[0], f"an error of the program, not of the file: {lines[0]}"
    if words[0] == "import":
        assert not Path(words[2]).exists() or "exists already" in lines[0]
        assert not list(Path(words[2]).parent.glob(".*"))
    return lines[0]


def refused_import(capfd: pytest.CaptureFixture[str], path: Path, *options: str | Path) -> str:
    return refused(capfd, "import", path, path.with_suffix(".refused"), *options)


def direct_model(architecture: str, *, scale: float | None = 2.0) -> AtomModel:
    """The reference's model, built by hand."""
    skipped = {"otf_graph", "use_pbc", "regress_forces", "direct_forces", "activation", "cbf", "envelope", "rbf"}
    sizes = {name: value for name, value in reference(architecture)[0].items() if name not in skipped}
    own = {"symmetrize": "oc20"} if architecture == GEMNET else {"angles": "detached"}
    model = build_model(name=architecture, **sizes, **own)
    model.load_state_dict(to_our_names(public_state(architecture, scale=scale)))
    return model.eval()


def predict(model: AtomModel) -> Prediction:
    graph = build_graph(samples(2), graph_spec(model.config))
    with torch.no_grad():
        return model(graph)


def assert_equal(one: AtomModel, other: AtomModel) -> None:
    assert one.config == other.config
    ours, theirs = predict(one), predict(other)
    assert ours.energy.abs().min() > 0
    assert torch.equal(ours.energy, theirs.energy)
    assert ours.forces is not None
    assert theirs.forces is not None
    assert torch.equal(ours.forces, theirs.forces)


# --------------------------------------------------------------------------------------------------------------- names


@both
def test_names_of_the_reference_there_and_back(architecture: str) -> None:
    state = reference(architecture)[1]
    ours = to_our_names(state)
    assert recognise(state) == architecture
    # However ours are ordered, theirs come in the order of registration, each alias behind what it repeats.
    back = to_public_names(dict(sorted(ours.items())), architecture)
    assert list(back) == [name for name in state if not name.endswith(".offset")]
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        *({"preset": preset} for preset in PRESETS if PRESETS[preset].sizes["num_blocks"] < 7),
        {"preset": "gemnet-dt", "rbf": "spherical_bessel", "num_radial": 8, "forces": "conservative"},
        {"preset": "gemnet-dt", "num_before_skip": 3, "num_after_skip": 11, "num_concat": 2, "num_atom": 12},
        {"preset": "dimenet++", "num_before_skip": 2, "num_output_layers": 12},
    ],
    ids=str,
)
def test_names_are_a_bijection(hyperparameters: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(**hyperparameters)
    architecture = model.config.name
    ours = list(model.state_dict())
    public = [to_public_name(name, architecture) for name in ours]
    assert None not in public
    assert len(set(public)) == len(ours)
    assert [to_our_name(name or "", architecture) for name in public] == ours
    assert sorted(public, key=lambda name: public_order(name or "", architecture))[0] != public[-1]


@pytest.mark.parametrize(
    "name",
    [
        *("", "out_blocks", "out_blocks.x.layers.0.linear.weight", "out_blocks.01.dense_rbf.linear.weight"),
        *("out_blocks.0.layers.0.linear.weight ", "out_blocks.0.layers.0.linear.bias", "Xatom_emb.embeddings.weight"),
        *("int_blocks.-1.dense_ca.linear.weight", "int_blocks.0.quad_interaction.dense_ca.linear.weight"),
        *("output_blocks.0.lins.0.scale", "interaction_blocks.0.lin_kj", "rbf.frequencies"),
    ],
)
def test_names_that_no_model_has(name: str) -> None:
    assert [to_our_name(name, architecture) for architecture in ARCHITECTURES] == [None, None]
    with pytest.raises(ValueError, match="no parameter"):
        to_our_names({"mlp_cbf3.weight": torch.zeros(1), name: torch.zeros(1)})


# ------------------------------------------------------------------------------------------------- import and export


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_import_use_export_import(architecture: str, layout: str, zipped: bool, save: Callable[..., Path]) -> None:
    path = save(checkpoint(architecture, layout), _use_new_zipfile_serialization=zipped)
    out = imported(path)
    trained = load_trained(out)
    assert_equal(trained.model, direct_model(architecture))
    assert trained.normalizer == Normalizer(MEAN, STD, STD)
    assert unfitted(trained.model) == []
    source = trained.run["source"]
    assert source["file"] == path.name
    assert (trained.run["step"], source["epoch"], source["weights"]) == (
        1200,
        3.25,
        "ema" if layout == "averaged" else "model",
    )
    assert source["metrics"]["forces_mae"] == 0.03

    layout = "v0" if layout.startswith("v0") else "v1"
    exported = path.with_name("exported.pt")
    words = ["checkpoint", "export", str(out), str(exported), "--layout", layout, "--prefix", "module.", "--json"]
    assert main(words) == 0
    state = torch.load(exported, weights_only=True)["state_dict"]
    expected = public_state(architecture, scale=2.0)
    assert [name.removeprefix("module.") for name in state] == list(expected)
    assert all(torch.equal(state[f"module.{name}"], value) for name, value in expected.items())

    again = imported(exported)
    first, second = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_trained(again).normalizer == trained.normalizer
    assert load_trained(again).model.config == trained.model.config
    assert load_trained(again).run["step"] == 1200


@both
def test_predicts_what_the_public_code_predicts(architecture: str, save: Callable[..., Path]) -> None:
    """To fp32 round-off: gaussians' coefficient, which the public code rounds, is exact here."""
    _, _, arrays = reference(architecture)
    trained = load_trained(imported(save(checkpoint(architecture, scale=None))))
    structures = []
    for system, cell in enumerate(arrays["cell"]):
        atoms = arrays["batch"] == system
        none = np.zeros(atoms.sum(), dtype=np.int64)
        numbers, positions = arrays["atomic_numbers"][atoms], arrays["positions"][atoms]
        structures.append(Sample(numbers, positions, cell, np.ones(3, dtype=bool), none, none.astype(bool)))
    graph = build_graph(structures, graph_spec(trained.model.config))
    with torch.no_grad():
        prediction = trained.model(graph)
    assert prediction.forces is not None
    for ours, name in ((prediction.energy, "energy64"), (prediction.forces, "forces64")):
        theirs = torch.as_tensor(arrays[name])
        assert (ours - theirs).norm() < 3e-5 * theirs.norm()


@both
def test_evaluation_and_calculator(
    architecture: str, save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = imported(save(checkpoint(architecture)))
    data = make_dataset(tmp_path / "data", 2, 2)
    capsys.readouterr()
    assert main(["evaluate", str(out), str(data / "s2ef" / "val_id"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 1200
    assert np.isfinite(report["splits"]["val_id"]["forces_mae"])
    atoms = slab("Pt")
    atoms.calc = Calculator(out, device="cpu")
    model = direct_model(architecture)
    graph = build_graph([Sample.from_atoms(atoms)], graph_spec(model.config))
    with torch.no_grad():
        expected = Normalizer(MEAN, STD, STD).physical(model(graph))
    assert atoms.get_potential_energy() == expected.energy.item()


TRAINING = """\
data: {{train: {data}/s2ef/train}}
model: {{}}
task: {{output: {output}, init_from: {start}, log_every: 1}}
optim: {{batch_size: 1, max_steps: 1, lr_initial: 1.0e-4, weight_decay: 0.01}}
"""


@both
def test_training_goes_on_from_it(architecture: str, save: Callable[..., Path], tmp_path: Path) -> None:
    out = imported(save(checkpoint(architecture)))
    places = {"data": make_dataset(tmp_path / "data", 2, 1), "output": tmp_path / "run", "start": out}
    config = tmp_path / "config.yaml"
    config.write_text(TRAINING.format(**places))
    assert main(["train", str(config), "data.workers=0", "--json"]) == 0
    before, after = load_trained(out), load_trained(tmp_path / "run")
    assert after.model.config == before.model.config
    assert after.normalizer == before.normalizer
    weights = after.model.state_dict()
    for name, value in before.model.state_dict().items():
        if name.endswith("scale_factor"):
            assert torch.equal(weights[name], value)
        else:
            assert (weights[name] - value).abs().max() < 3e-4  # one step of 1e-4
    with torch.no_grad():
        assert not torch.equal(predict(before.model).energy, predict(after.model).energy)


@both
def test_weights_can_be_chosen(architecture: str, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    content = checkpoint(architecture, "averaged")
    path = save(content)
    last = load_file(imported(path, "--weights", "model") / "model.safetensors")
    wanted = to_our_names({k.removeprefix("module.module."): v for k, v in content["state_dict"].items()})
    assert all(torch.equal(last[name], wanted[name]) for name in wanted)
    path = path.rename(path.with_name("second.pt"))
    averages = load_file(imported(path, "--weights", "ema") / "model.safetensors")
    assert all(torch.equal(averages[name], value) for name, value in direct_model(architecture).state_dict().items())
    assert "no averaged weights" in refused_import(capfd, save(checkpoint(architecture)), "--weights", "ema")
    content["ema"]["shadow_params"].pop()
    assert "averaged weights for" in refused_import(capfd, save(content))
    content["ema"]["shadow_params"].append(torch.zeros(3))
    assert "another shape" in refused_import(capfd, save(content))
    content["ema"] = {"averages": content["ema"]["shadow_params"]}
    assert "unknown form" in refused_import(capfd, save(content))


@both
def test_a_state_dict_alone(
    architecture: str, save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(public_state(architecture, scale=2.0))
    assert "--config" in refused_import(capfd, path)
    config = tmp_path / "config.yml"
    config.write_text(json.dumps(oc20_files.new_config(architecture)))  # JSON is YAML
    assert "--normalizer" in refused_import(capfd, path, "--config", config)
    given = [str(MEAN), str(STD), str(STD)]
    trained = load_trained(imported(path, "--config", str(config), "--normalizer", *given))
    assert_equal(trained.model, direct_model(architecture))
    assert trained.normalizer == Normalizer(MEAN, STD, STD)
    assert "leave --config out" in refused_import(capfd, save(checkpoint(architecture)), "--config", config)


def test_models_without_forces_and_with_conservative_ones(save: Callable[..., Path]) -> None:
    content = checkpoint(DIMENET)
    content["config"]["model"]["regress_forces"] = False
    content["normalizers"] = {"target": {"mean": -1.5, "std": 2.25}}
    trained = load_trained(imported(save(content, "energies.pt")))
    assert trained.model.config.forces == "none"
    assert (trained.normalizer.energy_mean, trained.normalizer.energy_std) == (-1.5, 2.25)
    trained = load_trained(imported(save(conservative_gemnet(), "conservative.pt")))
    assert trained.model.config.forces == "conservative"
    assert predict(trained.model).forces is not None


# ------------------------------------------------------------------------------------------------------ scale factors

SITES = {
    **{f"TripInteraction_{i}_{kind}": 10.0 + i for i in (1, 2) for kind in ("had_rbf", "sum_cbf")},
    **{f"AtomUpdate_{i}_sum": 1.0 + 0.1 * i for i in (1, 2)},
    **{f"OutBlock_{i}_{kind}": 3.0 + i for i in (0, 1, 2) for kind in ("sum", "had")},
}


def renamed(sites: dict[str, float]) -> dict[str, float]:
    """As the file published with GemNet-XL has them."""
    return {name.replace("AtomUpdate", "IntBlock"): value for name, value in sites.items()}


def by_module(sites: dict[str, float]) -> dict[str, Tensor]:
    return {f"module.{scale_factor_module(name)}": torch.tensor(value) for name, value in sites.items()}


def write_factors(path: Path, form: str) -> Path:
    if form == "pt":
        torch.save(by_module(SITES), path)
    else:
        path.write_text(json.dumps({"comment": "fitted", **(renamed(SITES) if form == "older JSON" else SITES)}))
    return path


@pytest.mark.parametrize("source", ["scale_dict", "scale_dict by module", "JSON", "older JSON", "pt"])
@pytest.mark.parametrize("stored", ["zero", "one", "none", "the same"])
def test_scale_factors(source: str, stored: str, save: Callable[..., Path], tmp_path: Path) -> None:
    content, options = checkpoint(GEMNET, scale=None), []
    for name in [name for name in content["state_dict"] if name.endswith("scale_factor")]:
        content["state_dict"][name] = torch.tensor(float(stored == "one"))
        if stored == "none":
            del content["state_dict"][name]
    if stored == "the same":
        for name, value in by_module(SITES).items():
            content["state_dict"][f"{name.removeprefix('module.')}.scale_factor"] = value
    if source.startswith("scale_dict"):
        content["scale_dict"] = SITES if source == "scale_dict" else by_module(SITES)
    else:
        options = ["--scale-file", str(write_factors(tmp_path / "factors", source))]
    model = load_trained(imported(save(content), *options)).model
    for site, value in SITES.items():
        ours = to_our_name(f"{scale_factor_module(site)}.scale_factor", GEMNET)
        assert model.get_buffer(ours or "").item() == pytest.approx(value, rel=1e-6)


def test_scale_factors_that_disagree_or_miss(
    save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    factors = write_factors(tmp_path / "factors.json", "JSON")
    message = refused_import(capfd, save(checkpoint(GEMNET)), "--scale-file", factors)
    assert "in state_dict, but" in message
    assert "factors.json" in message
    content = checkpoint(GEMNET, scale=None)
    content["scale_dict"] = SITES | {"OutBlock_7_sum": 1.5}
    assert "no scale factor OutBlock_7_sum" in refused_import(capfd, save(content))
    content["scale_dict"] = SITES | renamed({"AtomUpdate_1_sum": 1.7})
    assert "int_blocks.0.atom_update.scale_sum is 1.1 in scale_dict, but 1.7" in refused_import(capfd, save(content))
    content["scale_dict"] = {"OutBlock_0_sum": float("nan")}
    assert "nan" in refused_import(capfd, save(content))
    assert "has none" in refused_import(capfd, save(checkpoint(DIMENET)), "--scale-file", factors)
    del content["scale_dict"]
    capfd.readouterr()
    out = imported(save(content))
    warnings = json.loads(capfd.readouterr().out)["source"]["warnings"]
    assert "12 of 12 scale factors are not fitted" in warnings[0]
    assert len(unfitted(load_trained(out).model)) == 12


ATOM_UPDATES = {f"int_blocks.{i}.atom_update.scale_sum.scale_factor": 1.1 + 0.1 * i for i in (0, 1)}


def import_with_factors(
    path: Path, factors: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[dict[str, float], list[str]]:
    """(factors of atom updates by public name, warnings)."""
    capfd.readouterr()
    out = imported(path, "--scale-file", str(factors))
    warnings = json.loads(capfd.readouterr().out)["source"]["warnings"]
    model = load_trained(out).model
    shutil.rmtree(out)
    return {name: model.get_buffer(to_our_name(name, GEMNET) or "").item() for name in ATOM_UPDATES}, warnings


def test_one_gives_way_only_where_no_factor_is_fitted(
    save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The public code ignores the IntBlock_i_sum of the published file: a one in their place was in force."""
    content = checkpoint(GEMNET, scale=None)
    stored = content["state_dict"]
    for name, value in by_module(SITES).items():
        stored[f"{name.removeprefix('module.')}.scale_factor"] = value
    stored |= {name: torch.tensor(1.0) for name in ATOM_UPDATES}
    path = save(content)
    by_site, by_old_name = (write_factors(tmp_path / f"{form}.json", form) for form in ("JSON", "older JSON"))
    message = refused_import(capfd, path, "--scale-file", by_site)
    assert "int_blocks.0.atom_update.scale_sum is 1 in state_dict, but 1.1 in" in message
    kept, warnings = import_with_factors(path, by_old_name, capfd)
    assert set(kept.values()) == {1.0}
    assert len(warnings) == 1
    assert warnings[0].startswith(f"IntBlock_1_sum, IntBlock_2_sum of {by_old_name} were not taken")
    # Not said, they are taken from that name, and that is said.
    for name in ATOM_UPDATES:
        stored[name] = torch.tensor(0.0)
    taken, warnings = import_with_factors(save(content), by_old_name, capfd)
    assert taken == pytest.approx(ATOM_UPDATES)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"IntBlock_1_sum, IntBlock_2_sum of {by_old_name} were taken, which the public code")
    for name in stored:
        if name.endswith("scale_factor"):
            stored[name] = torch.tensor(1.0)
    taken, warnings = import_with_factors(save(content), by_old_name, capfd)
    assert taken == pytest.approx(ATOM_UPDATES)
    assert len(warnings) == 1
    assert import_with_factors(save(content), by_site, capfd)[1] == []


def test_a_one_of_a_scale_dict_does_not_give_way(
    save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint(GEMNET, scale=None)
    content["scale_dict"] = SITES | {"AtomUpdate_1_sum": 1.0}
    message = refused_import(capfd, save(content), "--scale-file", write_factors(tmp_path / "factors.json", "JSON"))
    assert "int_blocks.0.atom_update.scale_sum is 1 in scale_dict, but 1.1 in" in message


def test_factors_that_are_not_fitted_do_not_multiply_by_zero_in_the_old_code(save: Callable[..., Path]) -> None:
    out = imported(save(checkpoint(GEMNET, scale=None)))
    for layout, value in (("v0", 1.0), ("v1", 0.0)):
        exported = out.with_name(f"{layout}.pt")
        assert main(["checkpoint", "export", str(out), str(exported), "--layout", layout, "--json"]) == 0
        state = torch.load(exported, weights_only=True)["state_dict"]
        assert {float(x) for name, x in state.items() if name.endswith("scale_factor")} == {value}
        assert_equal(load_trained(imported(exported)).model, direct_model(GEMNET, scale=None))


# ------------------------------------------------------------------------------------------------ what is not imported


@both
def test_names_and_shapes_that_do_not_fit(
    architecture: str, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint(architecture, "v1, many processes")
    names = [name for name in content["state_dict"] if "blocks.1." in name and not name.endswith("scale_factor")]
    gone = [name for name in names if ".lin_up.weight" in name or "dense_rbf.linear" in name]
    for name in gone:
        del content["state_dict"][name]
    content["state_dict"]["module.spare.weight"] = torch.ones(2)
    line = refused_import(capfd, save(content))
    assert gone[0] in line
    assert "module.spare.weight" in line
    path = save(content)
    assert main(["checkpoint", "import", str(path), str(path.with_suffix(".imported")), "--json"]) == 1
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["missing"] == sorted(gone)
    assert report["unexpected"] == ["module.spare.weight"]
    assert len(err.strip().splitlines()) == 1
    content = checkpoint(architecture)
    name = next(
        name for name in content["state_dict"] if name.endswith(("blocks.1.lin_ji.weight", "1.dense_ca.linear.weight"))
    )
    content["state_dict"][name] = content["state_dict"][name][..., :-1].clone()
    assert "of shape" in refused_import(capfd, save(content))


def test_one_weight_under_two_names_must_be_one(save: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    content = checkpoint(GEMNET)
    name = "out_blocks.1.seq_energy.0.linear.weight"
    content["state_dict"][name] = content["state_dict"][name] + 1e-3
    assert f"{name} and out_blocks.1.layers.0.linear.weight are one weight" in refused_import(capfd, save(content))
    content = checkpoint(GEMNET)
    for name in [name for name in content["state_dict"] if ".layers." in name and name.startswith("out_blocks")]:
        del content["state_dict"][name]  # either name will do
    assert_equal(load_trained(imported(save(content))).model, direct_model(GEMNET))
    content = checkpoint(GEMNET)
    content["state_dict"]["radial_basis.rbf.offset"] = torch.linspace(0, 2, 24)
    assert "radial_basis.rbf.offset" in refused_import(capfd, save(content, "other.pt"))


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": (GEMNET, {"name": "gemnet_oc"}, "gemnet_oc"),
    "the other model": (GEMNET, {"name": DIMENET}, "dimenetplusplus"),
    "basis": (GEMNET, {"rbf": {"name": "bernstein"}}, "bernstein"),
    "angular basis": (GEMNET, {"cbf": {"name": "gaussian"}}, "cbf"),
    "envelope": (GEMNET, {"envelope": {"name": "exponential"}}, "exponential"),
    "setting of a basis": (GEMNET, {"rbf": {"name": "gaussian", "start": 1}}, "rbf.'start'"),
    "targets": (GEMNET, {"num_targets": 2}, "num_targets"),
    "activation": (GEMNET, {"activation": "siqu"}, "siqu"),
    "periodicity": (DIMENET, {"use_pbc": False}, "use_pbc"),
    "loose limit": (GEMNET, {"enforce_max_neighbors_strictly": False}, "enforce_max_neighbors_strictly"),
    "unknown": (GEMNET, {"quad_interaction": True}, "quad_interaction"),
    "size": (GEMNET, {"emb_size_edge": 64}, "emb_size_edge is 64, but the weights have 48"),
    "blocks": (DIMENET, {"num_blocks": 10**9}, "num_blocks"),
    "not a number": (GEMNET, {"cutoff": float("nan")}, "cutoff"),
    "not a truth": (GEMNET, {"extensive": 1}, "extensive"),
    "huge exponent": (DIMENET, {"envelope_exponent": 10**40}, "envelope_exponent"),
    "a section": (DIMENET, {"hidden_channels": {"a": 1}}, "hidden_channels"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_supported(
    case: str, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    architecture, changes, expected = SETTINGS[case]
    content = checkpoint(architecture)
    content["config"]["model"] |= changes
    assert expected in refused_import(capfd, save(content))


def test_defaults_are_those_of_the_public_constructors(save: Callable[..., Path]) -> None:
    content = checkpoint(DIMENET)
    sizes = ("name", "hidden_channels", "out_emb_channels", "num_blocks")
    content["config"]["model"] = {name: content["config"]["model"][name] for name in sizes}
    config = load_trained(imported(save(content))).model.config
    assert (config.cutoff, config.max_neighbors, config.forces) == (10.0, 50, "conservative")


NORMALIZERS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "mean force": ({"energy": {"mean": 0.0, "rmsd": 1.0}, "forces": {"mean": 0.1, "rmsd": 1.0}}, (), "mean of forces"),
    "no forces": ({"energy": {"mean": 0.0, "rmsd": 1.0}}, (), "lacks energies or forces"),
    "unknown": ({"stress": {"mean": 0.0, "rmsd": 1.0}}, (), "stress"),
    "no deviation": ({"energy": {"mean": 0.0}, "forces": {"mean": 0.0, "rmsd": 1.0}}, (), "std or rmsd"),
    "zero": ({"energy": {"mean": 0.0, "rmsd": 0.0}, "forces": {"mean": 0.0, "rmsd": 1.0}}, (), "energy_std"),
    "many": ({"energy": {"mean": torch.zeros(2), "rmsd": 1.0}, "forces": {"mean": 0.0, "rmsd": 1.0}}, (), "mean"),
    "none at all": ({}, (), "--normalizer"),
    "contradiction": (oc20_files.normalizers("new"), ("--normalizer", "0", "1", "1"), "contradicts"),
}


@pytest.mark.parametrize("case", NORMALIZERS)
def test_normalizers_that_make_no_sense(
    case: str, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    stored, options, expected = NORMALIZERS[case]
    content = checkpoint(GEMNET)
    content["normalizers"] = stored
    assert expected in refused_import(capfd, save(content), *options)


def conservative_gemnet() -> dict[str, Any]:
    content = checkpoint(GEMNET)
    content["config"]["model"]["direct_forces"] = False
    for name in list(content["state_dict"]):
        if any(part in name for part in ("seq_forces", "out_forces", "rbf_F")):
            del content["state_dict"][name]
    return content


@pytest.mark.parametrize("force_std", [1.5, 2.0])
@pytest.mark.parametrize("kind", ["GemNet-T", "DimeNet++", "direct"])
def test_two_deviations_are_two_slopes(
    kind: str, force_std: float, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Forces are then no longer minus the gradient of the energy, which is said."""
    content = conservative_gemnet() if kind == "GemNet-T" else checkpoint(DIMENET if kind == "DimeNet++" else GEMNET)
    content["normalizers"] = {"energy": {"mean": 0.0, "rmsd": 2.0}, "forces": {"mean": 0.0, "rmsd": force_std}}
    out = imported(save(content))
    warnings = json.loads(capfd.readouterr().out)["source"]["warnings"]
    assert [text for text in warnings if "0.75 times the slope of the energy" in text] == warnings
    assert len(warnings) == (kind != "direct" and force_std == 1.5)
    if kind != "GemNet-T":
        return
    trained = load_trained(out)
    model, step = trained.model.double(), 1e-4
    graph = build_graph(samples(1), graph_spec(model.config), torch.float64)

    def energy(by: float) -> float:
        positions = graph.positions.clone()
        positions[0, 0] += by
        return trained.normalizer.physical(model(replace(graph, positions=positions))).energy.item()

    forces = trained.normalizer.physical(model(graph)).forces
    assert forces is not None
    slope = (energy(step) - energy(-step)) / (2 * step)
    assert forces[0, 0].item() == pytest.approx(-slope * force_std / 2.0, rel=1e-4)


def test_element_references_are_not_dropped_in_silence(
    save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint(GEMNET)
    content["elementrefs"] = {"energy": OrderedDict(element_references=torch.zeros(128))}
    imported(save(content, "zeros.pt"))
    content["elementrefs"]["energy"]["element_references"][29] = -3.5
    path = save(content)
    assert "--without-element-references" in refused_import(capfd, path)
    run = load_trained(imported(path, "--without-element-references")).run
    assert run["source"]["element_references"]["energy"][29] == -3.5
    assert "element references" in run["source"]["warnings"][-1]
    content["elementrefs"] = {"energy": {"element_references": [0.0, -3.5]}}
    assert "expected a value for each element" in refused_import(capfd, save(content))
    content = checkpoint(GEMNET, "v1, normaliser in the configuration")
    content["config"]["dataset"]["train"]["transforms"]["element_references"] = {"file": "refs.pt"}
    assert "--without-element-references" in refused_import(capfd, save(content, "configured.pt"))


@both
def test_weights_that_are_no_weights(
    architecture: str, save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint(architecture)
    name = next(name for name in content["state_dict"] if "blocks.1." in name and name.endswith("weight"))
    whole = content["state_dict"][name]
    content["state_dict"][name] = torch.full_like(whole, float("inf"))
    assert "not finite" in refused_import(capfd, save(content))
    content["state_dict"][name] = whole.long()
    assert "int64" in refused_import(capfd, save(content))
    content["state_dict"][name] = torch.zeros(1).expand(whole.shape)
    assert "reaches beyond its storage" in refused_import(capfd, save(content))
    content["state_dict"][name] = whole.double()
    capfd.readouterr()
    imported(save(content, "double.pt"))
    assert "rounded to fp32" in capfd.readouterr().out
    content["state_dict"][name] = whole.bfloat16()
    trained = load_trained(imported(save(content, "half.pt"))).model.state_dict()
    assert torch.equal(trained[to_our_name(name, architecture) or ""], whole.bfloat16().float())


def test_what_public_models_cannot_be_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from egnscale.launch.run_files import RUN, WEIGHTS, run_record
    from egnscale.launch.weights import write_tensors
    from egnscale.scaling.checkpoint import write_checkpoint

    def trained(name: str, **hyperparameters: Any) -> Path:
        model = build_model(num_blocks=1, **hyperparameters)

        def write(directory: Path) -> None:
            write_tensors(directory / WEIGHTS, model.state_dict())
            record = run_record(model.config, Normalizer(0.0, 1.0, 1.0), step=1)
            (directory / RUN).write_text(json.dumps(record))

        write_checkpoint(tmp_path / name, write)
        return tmp_path / name

    gemnet = {"emb_size_atom": 4, "emb_size_edge": 4, "emb_size_trip": 4, "emb_size_bil_trip": 4}
    dimenet = {"hidden_channels": 4, "out_emb_channels": 4}
    out = tmp_path / "out.pt"
    assert "every neighbour" in refused(capfd, "export", trained("a", **gemnet, max_neighbors=None), out)
    assert "num_elements" in refused(capfd, "export", trained("b", **dimenet, num_elements=10), out)
    assert not out.exists()
    capfd.readouterr()
    for name, sizes, expected in (("c", gemnet, "symmetrize: union"), ("d", dimenet, "leaves angles out")):
        assert main(["checkpoint", "export", str(trained(name, **sizes)), str(tmp_path / f"{name}.pt")]) == 0
        assert expected in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- files, not models


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.args


def hostile(canary: Path) -> Iterator[tuple[str, Any]]:
    """(end of the name that is refused, object whose pickle would write the canary or do other harm)."""
    yield ".system", Call(os.system, f"touch {canary}")
    yield ".eval", Call(eval, f"open({str(canary)!r}, 'w')")
    yield ".exec", Call(exec, f"open({str(canary)!r}, 'w')")
    yield ".Popen", Call(subprocess.Popen, ["touch", str(canary)])
    yield ".getattr", Call(getattr, "", "join")
    yield ".open", Call(open, str(canary), "w")
    yield "shutil.copyfile", Call(shutil.copyfile, sys.executable, str(canary))
    yield ".bytearray", Call(bytearray, 1 << 40)
    yield ".silu", Call(torch.nn.functional.silu, 1)
    yield "torch._utils._rebuild_sparse_tensor", {"state_dict": {"a": torch.eye(2).to_sparse()}}
    yield "torch.nn.modules.linear.Linear", {"state_dict": torch.nn.Linear(2, 2)}
    yield "egnscale.launch.tasks.Normalizer", {"normalizers": Normalizer(0.0, 1.0, 1.0)}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}], ids=str)
def test_nothing_in_a_file_runs(
    options: dict[str, Any], save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    for name, harm in hostile(canary):
        content = checkpoint(GEMNET) | {"config": harm}
        path = save(content, **options)
        for words in (["import", path, tmp_path / "out"], ["info", path]):
            line = refused(capfd, *words)
            assert "asks for " in line
            assert f"{name}, which no OC20 checkpoint needs" in line
        assert not canary.exists()
    # Control: a reader that trusts the file does run it.
    torch.load(save({"a": Call(os.system, f"touch {canary}")}, **options), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_reads(zipped: bool, save: Callable[..., Path]) -> None:
    from collections import defaultdict

    from egnscale.launch.torch_file import read_torch_file

    storage = torch.arange(24.0)
    tensors = {
        "views": [storage[2:8:2], storage.view(4, 6).t(), storage[:0], storage.reshape(2, 3, 4)[1]],
        "types": [torch.tensor([1.5, 0.0], dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)],
        "whole": [torch.tensor([1, 0], dtype=getattr(torch, name)) for name in ("int64", "int8", "uint8", "bool")],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    plain = {
        "numbers": [0, -1, 255, 65536, -(2**40), 2**70, 1.5, float("inf"), True, None, (1, (2,)), [], {}],
        "text": ["", "ångström", b"bytes", 7 * "long"],
        "mapping": OrderedDict(a=1),
        "default": defaultdict(dict, {"b": {2: 3}}),
        "set": {1, 2},
        "size": torch.Size([2, 3]),
    }
    numpy = {"f": np.float64(0.25), "i": np.int32(-7), "b": np.bool_(True)}
    others = {"device": torch.device("cuda:1"), "path": Path("/a/b.pt"), "array": np.arange(6.0).reshape(2, 3)}
    found = read_torch_file(save({**tensors, **plain, **numpy, **others}, _use_new_zipfile_serialization=zipped))

    def compare(ours: Any, theirs: Any) -> None:
        if isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        elif isinstance(theirs, list):
            for one, other in zip(ours, theirs, strict=True):
                compare(one, other)
        else:
            assert ours == theirs
            assert type(ours) is type(theirs) or isinstance(theirs, dict | tuple | np.generic)

    for name, value in {**tensors, **plain, **numpy}.items():
        compare(found[name], value)
    assert (found["device"], found["path"]) == ("cuda:1", "/a/b.pt")
    assert torch.equal(found["array"], torch.arange(6.0, dtype=torch.float64).view(2, 3))


def archive(pickled: bytes, path: Path, storage: bytes = b"") -> Path:
    """A file of torch.save that holds this pickle, and one storage."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)
        file.writestr("archive/version", "3\n")
    return path


def a_tensor(numel: int, size: int, stride: int, offset: int = 0) -> bytes:
    """The pickle of {"a": tensor}, by hand."""

    def long(value: int) -> bytes:
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + long(numel) + b"tQ"
    rest = long(offset) + long(size) + b"\x85" + long(stride) + b"\x85\x89N"
    return b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs."


CLAIMS = {
    "more than there is": (a_tensor(1 << 40, 4, 1), "bytes, but"),
    "less than there is": (a_tensor(1, 1, 1), "bytes, but"),
    "a tensor beyond its storage": (a_tensor(4, 5, 1), "reaches beyond"),
    "an offset beyond its storage": (a_tensor(4, 2, 1, 3), "reaches beyond"),
    "a stride beyond its storage": (a_tensor(4, 2, 1 << 60), "reaches beyond"),
    "one element many times": (a_tensor(4, 1 << 50, 0), "reaches beyond"),
    "a negative stride": (a_tensor(4, 2, -1), "damaged shape"),
    "a negative offset": (a_tensor(4, 2, 1, -2), "damaged shape"),
    "a shape beyond 64 bits": (a_tensor(4, 1 << 63, 1), "damaged shape"),
    "a key that is nested 300,000 times": (b"\x80\2})" + b"\x85" * 300_000 + b"K\1s.", "dictionary's key"),
    "a value that is nested 300,000 times": (b"\x80\2}K\1)" + b"\x85" * 300_000 + b"s.", "no state_dict"),
    "a text of 4 EiB": (b"\x80\4\x8d" + (1 << 62).to_bytes(8, "little") + b"a.", "damaged"),
    "bytes of 1 TiB": (b"\x80\5\x96" + (1 << 40).to_bytes(8, "little") + b"a.", "damaged"),
    "a place in the memo of 32 GiB": (b"\x80\2}r\xff\xff\xff\xff.", "no state_dict"),
    "no end": (b"\x80\2" + b"(" * 1000, "damaged"),
    "nothing to take": (b"\x80\2s.", "damaged pickle"),
    "an item of a number": (b"\x80\2K\1K\2K\3s.", "damaged pickle"),
    "attributes of a number": (b"\x80\2K\1}b.", "damaged pickle"),
    "a call of a text": (b"\x80\2X\1\0\0\0a)R.", "a call of 'a'"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_pickle_claims_is_checked(claim: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pickled, expected = CLAIMS[claim]
    path = archive(pickled, tmp_path / "file.pt", storage=bytes(16))
    assert expected in refused(capfd, "import", path, tmp_path / "out")


def test_the_pickle_by_hand_is_right(tmp_path: Path) -> None:
    """The tensors above fail for what they claim."""
    from egnscale.launch.torch_file import read_torch_file

    storage = torch.arange(4.0)
    path = archive(a_tensor(4, 2, 2, 1), tmp_path / "file.pt", storage.numpy().tobytes())
    assert torch.equal(read_torch_file(path)["a"], storage[1::2])


def damaged(place: Path, kind: str) -> None:
    content = checkpoint(DIMENET)
    path = place / "file.pt"
    torch.save(content, path)
    whole = path.read_bytes()
    match kind:
        case "a directory":
            path.unlink()
            path.mkdir()
        case "nothing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no checkpoint\n")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "a changed weight":
            at = whole.index(content["state_dict"]["emb.emb.weight"].numpy().tobytes())
            path.write_bytes(whole[: at + 100] + bytes([whole[at + 100] ^ 1]) + whole[at + 101 :])
        case "another zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "hello")
        case "compressed":
            with zipfile.ZipFile(path) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in entries.items():
                    archive.writestr(name, data)
        case "safetensors":
            save_file({"a": torch.ones(2)}, path)
        case "a tensor":
            torch.save(torch.ones(3), path)
        case "no weights":
            torch.save({"state_dict": {}}, path)
        case "other weights":
            torch.save({"state_dict": {"encoder.weight": torch.ones(3)}}, path)
        case "a list for weights":
            torch.save({"state_dict": [torch.ones(3)]}, path)
        case "a program":
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
        case "a tar":
            import tarfile

            with tarfile.open(path, "w") as archive:
                archive.add(__file__)
        case "holds itself":
            content["config"]["model"]["hidden_channels"] = content["config"]
            torch.save(content, path)


DAMAGE = {
    "a directory": "is a directory",
    "nothing": "No such file",
    "empty": "is empty",
    "text": "not a file of torch.save",
    "cut": "damaged",
    "a changed weight": "checksum",
    "another zip": "not one of torch.save",
    "compressed": "compressed",
    "safetensors": "not a file of torch.save",
    "a tensor": "no checkpoint of OC20",
    "no weights": "no state_dict",
    "other weights": "neither GemNet-T nor DimeNet++: its weights begin with encoder.weight",
    "a list for weights": "no state_dict",
    "a program": "TorchScript",
    "a tar": "tar",
    "holds itself": "hidden_channels",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_that_are_no_checkpoints(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damaged(tmp_path, kind)
    line = refused(capfd, "import", tmp_path / "file.pt", tmp_path / "out")
    assert DAMAGE[kind] in line
    assert "file.pt" in line


def test_nothing_is_overwritten(save: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(checkpoint(DIMENET))
    out = imported(path)
    assert "exists already" in refused(capfd, "import", path, out)
    assert "exists already" in refused(capfd, "export", out, path)
    (tmp_path / "mine").write_text("keep")
    assert "exists already" in refused(capfd, "import", path, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "keep"
    assert "no checkpoint" in refused(capfd, "export", tmp_path, tmp_path / "new.pt")
    assert "no such path" in refused(capfd, "info", tmp_path / "none")


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from egnscale.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_nothing_behind(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(checkpoint(DIMENET))
    out = imported(path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for words in (["import", path, tmp_path / "new"], ["export", out, tmp_path / "new.pt"]):
        command = [sys.executable, "-c", FULL_DISK, "checkpoint", *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 1, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert "--debug shows" not in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@both
def test_info(architecture: str, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = save(checkpoint(architecture, "averaged"))
    out = imported(path)
    capsys.readouterr()
    reports = []
    for what in (path, out):
        assert main(["checkpoint", "info", str(what), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        assert main(["checkpoint", "info", str(what)]) == 0
        shown = capsys.readouterr().out
        assert architecture in shown
        assert "1200" in shown
    of_file, of_checkpoint = reports
    assert of_file.keys() == of_checkpoint.keys()
    for name in ("model", "parameters", "normalizer", "step", "epoch", "scale_factors"):
        assert of_file[name] == of_checkpoint[name]
    factors = 12 if architecture == GEMNET else 0
    assert of_file["scale_factors"] == {"fitted": factors, "all": factors}
    assert of_file["metrics"] == {"validation": {"forces_mae": 0.03}}
    content = checkpoint(architecture)
    content["config"]["model"]["activation"] = "relu"
    assert main(["checkpoint", "info", str(save(content)), "--json"]) == 0
    assert "relu" in json.loads(capsys.readouterr().out)["problem"]


FUZZ = Path(__file__).parents[1] / "oc20_fuzz.py"


def test_mutated_files_are_refused_in_one_line_or_imported(tmp_path: Path) -> None:
    """1,000 of them, in a process with 1 GiB to spare: no crash, nothing run, no other error, nothing left behind."""
    command = [sys.executable, str(FUZZ), "1000", "0", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == []
    assert report["events"] == []
    assert report["slowest"] < 30
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == 1000
    # The mutations are neither all harmless nor all fatal; payloads never come through.
    assert min(outcomes[f"{kind}: refused"] for kind in ("bits", "cuts", "pickle bits", "content", "payload")) > 20
    assert outcomes["content: imported"] > 20
    assert "payload: imported" not in outcomes
