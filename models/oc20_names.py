"""Parameter names of the public OC20 GemNet-T, and ours.

The public state dict also lists every weight of an output block's energy branch twice (`layers.*` and `seq_energy.*`
are the same tensors); the alias is left out here.
"""

from __future__ import annotations

import re

from torch import Tensor

#: Public pattern -> our replacement; the first that matches a whole prefix applies, then the rest of the name.
_RULES = (
    (r"^mlp_rbf3\.", "embedding.mlp_rbf."),
    (r"^mlp_cbf3\.weight$", "embedding.mlp_cbf"),
    (r"^mlp_rbf_h\.", "embedding.mlp_rbf_atom."),
    (r"^mlp_rbf_out\.", "embedding.mlp_rbf_out."),
    (r"^atom_emb\.embeddings\.weight$", "embedding.atom_embedding"),
    (r"^edge_emb\.", "embedding.edge_embedding."),
    (r"^radial_basis\.rbf\.frequencies$", "embedding.radial_basis.frequencies"),
    (r"^cbf_basis3\.radial_basis\.rbf\.frequencies$", "embedding.radial_basis_cbf.frequencies"),
    (r"^out_blocks\.0\.", "embedding.output."),
    (r"^out_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) - 1}.output."),
    (r"^int_blocks\.(\d+)\.", r"blocks.\1.interaction."),
    (r"\.trip_interaction\.mlp_cbf\.weight$", ".trip_interaction.mlp_cbf"),
    (r"\.output\.(layers|dense_rbf|scale_sum)\.", r".output.atom_sum.\1."),
    (r"\.output\.seq_forces\.", ".output.force.layers."),
    (r"\.output\.dense_rbf_F\.", ".output.force.dense_rbf."),
    (r"\.output\.scale_rbf_F\.", ".output.force.scale_had."),
    (r"\.output\.out_forces\.", ".output.force.out."),
    (r"\.dense_mlp\.", ".layers."),
    (r"\.linear\.weight$", ".weight"),
)
_IGNORED = re.compile(r"\.seq_energy\.|\.rbf\.offset$")


def to_our_names(public: dict[str, Tensor]) -> dict[str, Tensor]:
    """A public GemNet-T state dict (prefixes stripped) under our parameter names; aliases and constants dropped."""
    ours = {}
    for name, value in public.items():
        if _IGNORED.search(name):
            continue
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours
