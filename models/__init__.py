"""What is computed: the graph record, its verbs, EGN blocks, GemNet-T, DimeNet++. Imports torch and nothing of ours."""

if __name__ != "egnscale.models":
    raise ImportError("`import models` finds a folder of egnscale's source tree; write `import egnscale.models`")

from egnscale.models.dimenet import DimeNetConfig, DimeNetPlusPlus
from egnscale.models.egn import EGN, EGNBlock
from egnscale.models.forces import Prediction, conservative
from egnscale.models.gemnet import GemNetConfig, GemNetT
from egnscale.models.graph import ExtendedGraph, GraphPartition, WholeGraph
from egnscale.models.layered import LayeredModel
from egnscale.models.registry import PRESETS, AtomModel, AtomModelConfig, build_model, count_parameters, model_config

__all__ = [
    "EGN",
    "PRESETS",
    "AtomModel",
    "AtomModelConfig",
    "DimeNetConfig",
    "DimeNetPlusPlus",
    "EGNBlock",
    "ExtendedGraph",
    "GemNetConfig",
    "GemNetT",
    "GraphPartition",
    "LayeredModel",
    "Prediction",
    "WholeGraph",
    "build_model",
    "conservative",
    "count_parameters",
    "model_config",
]
