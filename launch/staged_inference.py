"""A trained model whose layers are spread over a pipeline, to predict with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from egnscale.launch.pipelining import StagedModel
from egnscale.launch.weights import open_weights
from egnscale.models import AtomModelConfig, ExtendedGraph, Prediction, build_model
from egnscale.models.stage import only_layers
from egnscale.scaling.engine import start_world
from egnscale.scaling.layout import Mesh
from egnscale.scaling.pipeline import Pipeline
from egnscale.scaling.stages import stage_bounds


class StagedInference(nn.Module):
    """`model(graph) -> Prediction`, on every stage. Each rank has the weights of its layers only.

    Calling it is collective over the pipeline: all of its ranks call it with the same graphs, or their parts of them.

    Args:
        config: of the model.
        weights: path of a `model.safetensors`.
        mesh: this rank's place.

    Raises:
        ValueError: if the weights do not fit, or there are more stages than the model has layers.
    """

    def __init__(self, config: AtomModelConfig, weights: Path, mesh: Mesh) -> None:
        super().__init__()
        self.config, stages = config, mesh.layout.pipe
        # An embedding costs about as much as an output block, a fifth of a block.
        bounds = stage_bounds([0.2, *[1.0] * config.num_blocks, 0.0], stages)
        begin, end = bounds[mesh.stage : mesh.stage + 2]
        with only_layers(begin, end, bounds[-1]):
            model: Any = build_model(config)
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        with open_weights(weights) as stored, torch.no_grad():
            stored.check_fit({name: value.shape for name, value in state.items()})
            for name, value in state.items():
                if not value.is_meta:
                    value.copy_(stored[name])
        ds = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 10**9}
        pipeline = Pipeline(model, model.layers[begin:end], None, ds, start_world(), stages)
        pipeline.train(False)
        self.staged = StagedModel(model, bounds, mesh, pipeline)
        self.model = model

    def forward(self, graph: ExtendedGraph) -> Prediction:
        return self.predict([graph])[0]

    def predict(self, graphs: Sequence[ExtendedGraph]) -> list[Prediction]:
        """Of several graphs, which keeps all stages busy."""
        return self.staged.predict(graphs)

    @property
    def at_once(self) -> int:
        return self.staged.at_once

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StagedInference:
        return super()._apply(lambda x: x if x.is_meta else fn(x), recurse)
