"""Under ZeRO-3 a model is built and loaded without ever being whole on a rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import DIMENET, GEMNET
from spawn import spawn

from egnscale.launch.weights import open_weights
from egnscale.models import build_model
from egnscale.models.layered import Blocks, LayeredModel
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config

MODELS: dict[str, dict[str, Any]] = {
    "gemnet": GEMNET | {"num_blocks": 6},
    "gemnet, zeros": GEMNET | {"num_blocks": 6, "output_init": "zeros"},
    "dimenet": DIMENET | {"num_blocks": 6},
}
CASES = [(model, precision) for model in MODELS for precision in ("fp32", "bf16")]


def built(model: str) -> Any:
    torch.manual_seed(5)
    return build_model(**MODELS[model])


def build(world: Any, model: str, precision: Any, file: str) -> dict[str, Any]:
    from egnscale.scaling import engine as engine_module
    from egnscale.scaling.engine import Engine, sharded_layers

    config = complete_ds_config(
        read_ds_config("zero3-lean"), zero=3, precision=precision, gradient_accumulation=1, clip_grad_norm=None
    )
    whole: list[int] = []  # elements that were whole each time that a layer was shared out

    class Watched(engine_module.deepspeed.zero.Init):
        def __init__(self, module: torch.nn.Module, **options: Any) -> None:
            whole.append(sum(p.numel() for p in module.parameters()))
            super().__init__(module=module, **options)

    init, engine_module.deepspeed.zero.Init = engine_module.deepspeed.zero.Init, Watched
    try:
        with sharded_layers(config, LayeredModel, Blocks):
            module = built(model)
    finally:
        engine_module.deepspeed.zero.Init = init
    shares = sum(p.ds_tensor.numel() for p in module.parameters())
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.1), config, world)
    found = dict(engine.whole_masters())
    held_before = {name: part.clone() for name, part in engine.held()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    read: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        with open_weights(Path(file)) as stored:
            for name in engine.shapes():
                read.append(name)
                yield name, stored[name]

    engine.set_weights(weights())
    loaded = dict(engine.whole_masters())
    changed = all(
        not torch.equal(before, part) for (_, part), before in zip(engine.held(), held_before.values(), strict=True)
    )
    return {
        "whole": whole, "shares": shares, "weights": found, "buffers": buffers, "loaded": loaded,
        "held": {name: part.dtype for name, part in engine.held()}, "changed": changed,
    }  # fmt: skip


def build_all(world: Any, folder: str) -> list[dict[str, Any]]:
    return [build(world, model, precision, f"{folder}/{model}.safetensors") for model, precision in CASES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("weights")
    for model in MODELS:
        tensors = {name: value.detach() + 0.5 for name, value in built(model).named_parameters()}
        save_file(tensors, folder / f"{model}.safetensors")
    return spawn(2, build_all, str(folder))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_built_layer_by_layer(found: list[list[dict[str, Any]]], case: int) -> None:
    name, precision = CASES[case]
    model = built(name)
    total = sum(p.numel() for p in model.parameters())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for rank in found:
        result = rank[case]
        assert sum(result["whole"]) == total, "every parameter is shared out once"
        assert max(result["whole"]) < total / 3, "never more than a layer is whole"
        assert result["shares"] < total / 2 + 2 * len(result["weights"]), "a rank has its share"
        assert set(result["held"].values()) == {dtype}
        for key, value in model.named_parameters():
            assert torch.equal(result["weights"][key], value.detach().to(dtype).float()), key
            assert torch.equal(result["loaded"][key], value.detach() + 0.5), key
        assert result["changed"]
        for key, buffer in model.named_buffers():
            assert torch.equal(result["buffers"][key], buffer), key
            assert result["buffers"][key].dtype == buffer.dtype, key
