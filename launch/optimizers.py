"""AdamW over a model's parameters."""

from __future__ import annotations

import torch
from torch import nn

from egnscale.launch.config import OptimConfig

#: Parameters that weight decay leaves alone.
NO_DECAY = ("embedding", "frequencies", "bias")


def make_optimizer(
    optim: OptimConfig, module: nn.Module, *, every_group: bool = False
) -> tuple[torch.optim.AdamW, nn.ParameterList]:
    """The optimizer of a run, over the parameters that this rank has.

    Args:
        every_group: have the decayed and the other parameters as two groups even where there are none of one kind: in
            a pipeline, DeepSpeed adds up norms over stages group by group, and waits for ever where one has fewer.

    Returns:
        the optimizer, and parameters that are in it for this alone.
    """
    here = [(name, p) for name, p in module.named_parameters() if not p.is_meta]  # the others are another stage's
    decayed = [p for name, p in here if not any(word in name.split(".")[-1] for word in NO_DECAY)]
    plain = [p for name, p in here if any(word in name.split(".")[-1] for word in NO_DECAY)]
    spare = nn.ParameterList()
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if every_group:
        for group in groups:
            if not group["params"]:
                spare.append(nn.Parameter(torch.zeros(1)))
                group["params"] = [spare[-1]]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr_initial,
        betas=optim.betas,
        eps=optim.eps,
        amsgrad=optim.amsgrad,
    )
    return optimizer, spare
