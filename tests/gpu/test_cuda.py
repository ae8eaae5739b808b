"""One CUDA device gives what the CPU gives. Skipped without one; `pytest tests/gpu` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import make_dataset, samples, write_config

from egnscale.data.batch import Collate
from egnscale.launch.cli import main
from egnscale.launch.loading import graph_spec
from egnscale.models import build_model
from egnscale.models.scale_factors import fit_scale_factors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GEMNET = {
    "num_blocks": 2, "emb_size_atom": 32, "emb_size_edge": 48, "emb_size_trip": 20, "emb_size_bil_trip": 24,
    "num_radial": 24,
}  # fmt: skip
DIMENET = {"num_blocks": 2, "hidden_channels": 48, "out_emb_channels": 32, "int_emb_size": 20}
MODELS = {
    "block": GEMNET | {"triplet_form": "block"},
    "harmonic": GEMNET | {"triplet_form": "harmonic"},
    "conservative": GEMNET | {"forces": "conservative"},
    "dimenet": DIMENET,
}


def gradients(device: str, dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(**MODELS[name])
    if name == "dimenet":
        for output in (model.embedding.output, *(block.output for block in model.blocks)):
            torch.nn.init.normal_(output.lin.weight, std=0.2)  # they start at zero
    graph, _ = Collate(graph_spec(model.config), dtype=torch.float64)(samples(4))
    fit_scale_factors(model.double(), [graph])
    geometry = torch.float32 if dtype == torch.bfloat16 else dtype
    model = model.to(device=device, dtype=dtype)
    prediction = model(graph.to(device, dtype=geometry))
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.double().cpu() for name, grad in found.items() if grad is not None} | {
        "energy": prediction.energy.detach().double().cpu(),
        "forces": prediction.forces.detach().double().cpu(),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_cuda_agrees_with_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted, found = gradients("cpu", torch.float64, name), gradients("cuda", dtype, name)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert (found[key] - value).norm() <= tolerance * value.norm() + 1e-12, key


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_training_step_under_deepspeed(
    zero: int, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", make_dataset(tmp_path / "data", 8, 3), tmp_path / "run")
    words = [f"parallel.zero={zero}", f"parallel.precision={precision}", "optim.max_steps=4", "--json"]
    assert main(["train", str(config), *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"] == pytest.approx(result["loss"])  # not NaN
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "data"), "--json"]) == 0
