"""What is computed: the graph record, its verbs, the EGN block, GemNet-T. Imports torch and nothing of ours."""

if __name__ != "egnscale.models":
    raise ImportError("`import models` finds a folder of egnscale's source tree; write `import egnscale.models`")

from egnscale.models.egn import EGN, EGNBlock
from egnscale.models.gemnet import GemNetConfig, GemNetT, Prediction
from egnscale.models.graph import ExtendedGraph, GraphPartition, WholeGraph
from egnscale.models.registry import PRESETS, build_model, count_parameters, model_config

__all__ = [
    "EGN",
    "PRESETS",
    "EGNBlock",
    "ExtendedGraph",
    "GemNetConfig",
    "GemNetT",
    "GraphPartition",
    "Prediction",
    "WholeGraph",
    "build_model",
    "count_parameters",
    "model_config",
]
