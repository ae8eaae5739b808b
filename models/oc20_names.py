"""Parameter names of the public OC20 models (GemNet-T, DimeNet++), and ours.

A table for each architecture pairs a public name with ours, one row per kind of parameter; `{n}` is a block, `{k}` and
`{j}` count layers within it. Each row reads in both directions; a name that fits no row is no parameter of the model.
Rows stand in the order in which the public modules register their parameters, which is the order of averaged (EMA)
weights in public checkpoints. The public GemNet-T also lists

* every weight of an output block's energy branch twice: `seq_energy.*` are the tensors of `layers.*`;
* the centers of its gaussians, `*.rbf.offset`, which are constants.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from torch import Tensor

#: Rows for an output block of GemNet-T: within the block, public and ours.
_GEMNET_OUTPUT = (
    ("dense_rbf.linear.weight", "atom_sum.dense_rbf.weight"),
    ("scale_sum.scale_factor", "atom_sum.scale_sum.scale_factor"),
    ("layers.0.linear.weight", "atom_sum.layers.0.weight"),
    ("layers.{k}.dense_mlp.{j}.linear.weight", "atom_sum.layers.{k}.layers.{j}.weight"),
    ("out_energy.linear.weight", "out_energy.weight"),
    ("scale_rbf_F.scale_factor", "force.scale_had.scale_factor"),
    ("seq_forces.0.linear.weight", "force.layers.0.weight"),
    ("seq_forces.{k}.dense_mlp.{j}.linear.weight", "force.layers.{k}.layers.{j}.weight"),
    ("out_forces.linear.weight", "force.out.weight"),
    ("dense_rbf_F.linear.weight", "force.dense_rbf.weight"),
)
_GEMNET_INTERACTION = (
    ("dense_ca.linear.weight", "dense_ca.weight"),
    ("trip_interaction.dense_ba.linear.weight", "trip_interaction.dense_ba.weight"),
    ("trip_interaction.mlp_rbf.linear.weight", "trip_interaction.mlp_rbf.weight"),
    ("trip_interaction.scale_rbf.scale_factor", "trip_interaction.scale_rbf.scale_factor"),
    ("trip_interaction.mlp_cbf.weight", "trip_interaction.mlp_cbf"),
    ("trip_interaction.scale_cbf_sum.scale_factor", "trip_interaction.scale_cbf_sum.scale_factor"),
    ("trip_interaction.down_projection.linear.weight", "trip_interaction.down_projection.weight"),
    ("trip_interaction.up_projection_ca.linear.weight", "trip_interaction.up_projection_ca.weight"),
    ("trip_interaction.up_projection_ac.linear.weight", "trip_interaction.up_projection_ac.weight"),
    ("layers_before_skip.{k}.dense_mlp.{j}.linear.weight", "layers_before_skip.{k}.layers.{j}.weight"),
    ("layers_after_skip.{k}.dense_mlp.{j}.linear.weight", "layers_after_skip.{k}.layers.{j}.weight"),
    ("atom_update.dense_rbf.linear.weight", "atom_update.dense_rbf.weight"),
    ("atom_update.scale_sum.scale_factor", "atom_update.scale_sum.scale_factor"),
    ("atom_update.layers.0.linear.weight", "atom_update.layers.0.weight"),
    ("atom_update.layers.{k}.dense_mlp.{j}.linear.weight", "atom_update.layers.{k}.layers.{j}.weight"),
    ("concat_layer.dense.linear.weight", "concat_layer.dense.weight"),
    ("residual_m.{k}.dense_mlp.{j}.linear.weight", "residual_m.{k}.layers.{j}.weight"),
)
#: DimeNet++'s names within a block are the public ones.
_DIMENET_OUTPUT = (
    *("lin_rbf.weight", "lin_up.weight", "lin_up.bias"),
    *("lins.{k}.weight", "lins.{k}.bias", "lin.weight"),
)
_DIMENET_INTERACTION = (
    *("lin_rbf1.weight", "lin_rbf2.weight", "lin_sbf1.weight", "lin_sbf2.weight"),
    *("lin_kj.weight", "lin_kj.bias", "lin_ji.weight", "lin_ji.bias", "lin_down.weight", "lin_up.weight"),
    *(f"layers_before_skip.{{k}}.{part}" for part in ("lin1.weight", "lin1.bias", "lin2.weight", "lin2.bias")),
    *("lin.weight", "lin.bias"),
    *(f"layers_after_skip.{{k}}.{part}" for part in ("lin1.weight", "lin1.bias", "lin2.weight", "lin2.bias")),
)


def _within(public: str, ours: str, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(public + theirs, ours + own) for theirs, own in rows]


#: Architecture -> groups of rows. A group is registered block by block.
_TABLES: dict[str, list[list[tuple[str, str]]]] = {
    "gemnet_t": [
        [
            ("radial_basis.rbf.frequencies", "embedding.radial_basis.frequencies"),
            ("cbf_basis3.radial_basis.rbf.frequencies", "embedding.radial_basis_cbf.frequencies"),
            ("mlp_rbf3.linear.weight", "embedding.mlp_rbf.weight"),
            ("mlp_cbf3.weight", "embedding.mlp_cbf"),
            ("mlp_rbf_h.linear.weight", "embedding.mlp_rbf_atom.weight"),
            ("mlp_rbf_out.linear.weight", "embedding.mlp_rbf_out.weight"),
            ("atom_emb.embeddings.weight", "embedding.atom_embedding"),
            ("edge_emb.dense.linear.weight", "embedding.edge_embedding.dense.weight"),
        ],
        _within("out_blocks.0.", "embedding.output.", _GEMNET_OUTPUT),
        _within("out_blocks.{n+1}.", "blocks.{n}.output.", _GEMNET_OUTPUT),
        _within("int_blocks.{n}.", "blocks.{n}.interaction.", _GEMNET_INTERACTION),
    ],
    "dimenetplusplus": [
        [
            ("rbf.freq", "embedding.radial_basis.frequencies"),
            ("emb.emb.weight", "embedding.atom_embedding"),
            *((f"emb.{name}", f"embedding.{name}") for name in ("lin_rbf.weight", "lin_rbf.bias")),
            *((f"emb.{name}", f"embedding.{name}") for name in ("lin.weight", "lin.bias")),
        ],
        _within("output_blocks.0.", "embedding.output.", zip(_DIMENET_OUTPUT, _DIMENET_OUTPUT, strict=True)),
        _within("output_blocks.{n+1}.", "blocks.{n}.output.", zip(_DIMENET_OUTPUT, _DIMENET_OUTPUT, strict=True)),
        _within(
            "interaction_blocks.{n}.",
            "blocks.{n}.interaction.",
            zip(_DIMENET_INTERACTION, _DIMENET_INTERACTION, strict=True),
        ),
    ],
}
ARCHITECTURES = tuple(_TABLES)
#: A name that only this architecture has.
_TELLTALE = {
    "gemnet_t": re.compile(r"int_blocks\.0\.trip_interaction\.mlp_cbf\.weight|mlp_cbf3\.weight"),
    "dimenetplusplus": re.compile(r"interaction_blocks\.0\.lin_sbf1\.weight|emb\.emb\.weight"),
}
#: The file published with GemNet-XL has this older name of a site, which the public code passes over in silence.
_IGNORED_SITE = "IntBlock_{n+1}_sum"
#: Sites of scale factors as the public files name them, and the modules they mean.
_SITES = (
    ("TripInteraction_{n+1}_had_rbf", "int_blocks.{n}.trip_interaction.scale_rbf"),
    ("TripInteraction_{n+1}_sum_cbf", "int_blocks.{n}.trip_interaction.scale_cbf_sum"),
    ("OutBlock_{n}_sum", "out_blocks.{n}.scale_sum"),
    ("OutBlock_{n}_had", "out_blocks.{n}.scale_rbf_F"),
    ("AtomUpdate_{n+1}_sum", "int_blocks.{n}.atom_update.scale_sum"),
    (_IGNORED_SITE, "int_blocks.{n}.atom_update.scale_sum"),
)
_CONSTANT = re.compile(r"(cbf_basis3\.)?radial_basis\.rbf\.offset")
_ALIAS = re.compile(r"(out_blocks\.\d+\.)seq_energy\.(.+)")
_ALIASED = re.compile(r"(out_blocks\.\d+\.)layers\.(.+)")
_PLACEHOLDER = re.compile(r"\{([a-z])(\+1)?\}")


@cache
def _regex(template: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(template)
    text = "".join(
        re.escape(part) if index % 3 == 0 else f"(?P<{part}>0|[1-9][0-9]{{0,5}})" if index % 3 == 1 else ""
        for index, part in enumerate(parts)
    )
    return re.compile(text)


def _parse(template: str, name: str) -> dict[str, int] | None:
    """The numbers in a name of this form, or None: out_blocks.{n+1}.x, out_blocks.3.x -> {n: 2}."""
    match = _regex(template).fullmatch(name)
    if match is None:
        return None
    numbers = {key: int(text) for key, text in match.groupdict().items()}
    for key, plus in _PLACEHOLDER.findall(template):
        numbers[key] -= bool(plus)
    return None if any(number < 0 for number in numbers.values()) else numbers


def _fill(template: str, numbers: Mapping[str, int]) -> str:
    return _PLACEHOLDER.sub(lambda match: str(numbers[match[1]] + bool(match[2])), template)


def _translate(name: str, rows: Iterable[tuple[str, str]]) -> str | None:
    for source, target in rows:
        numbers = _parse(source, name)
        if numbers is not None:
            return _fill(target, numbers)
    return None


def recognise(names: Collection[str]) -> str | None:
    """The architecture whose public parameters these names (without prefixes) are, or None."""
    for architecture, telltale in _TELLTALE.items():
        if any(telltale.fullmatch(name) for name in names):
            return architecture
    return None


def to_our_name(public: str, architecture: str) -> str | None:
    """Our name of a public parameter or scale factor; None if the architecture has none of that name."""
    return _translate(public, (row for group in _TABLES[architecture] for row in group))


def to_public_name(ours: str, architecture: str) -> str | None:
    """The inverse of `to_our_name`."""
    return _translate(ours, ((own, theirs) for group in _TABLES[architecture] for theirs, own in group))


def alias_of(public: str) -> str | None:
    """The second name under which the public GemNet-T lists this parameter, or None."""
    match = _ALIASED.fullmatch(public)
    return f"{match[1]}seq_energy.{match[2]}" if match else None


def without_alias(public: str) -> str:
    """The first name of what may be a second one."""
    match = _ALIAS.fullmatch(public)
    return f"{match[1]}layers.{match[2]}" if match else public


def is_constant(public: str) -> bool:
    """Whether the public GemNet-T lists the centers of its gaussians under this name."""
    return _CONSTANT.fullmatch(public) is not None


def scale_factor_module(site: str) -> str | None:
    """The public module that a name in a file of scale factors means, or None.

    Known are public sites (`TripInteraction_1_had_rbf`) and paths of modules, such as
    `int_blocks.0.trip_interaction.scale_rbf`, also with `.scale_factor` at the end.
    """
    path = site.removesuffix(".scale_factor")
    if to_our_name(f"{path}.scale_factor", "gemnet_t") is not None:
        return path
    return _translate(site, _SITES)


def is_ignored_site(site: str) -> bool:
    """Whether a name in a file of scale factors is one that the public code passes over in silence."""
    return _parse(_IGNORED_SITE, site) is not None


def public_order(public: str, architecture: str) -> tuple[int, ...]:
    """A sort key: public parameters in the order in which the public model registers them.

    Raises:
        ValueError: if the architecture has no such parameter.
    """
    for position, group in enumerate(_TABLES[architecture]):
        stems = [row[0].partition("{k}")[0] for row in group]
        for index, (theirs, _) in enumerate(group):
            numbers = _parse(theirs, public)
            if numbers is not None:
                # Rows that differ only after {k} are registered together, layer by layer.
                family = stems.index(stems[index])
                return position, numbers.get("n", 0), family, numbers.get("k", 0), index, numbers.get("j", 0)
    raise ValueError(f"{architecture} has no parameter {public!r}")


def to_our_names(public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A public state dict (prefixes stripped) under our parameter names; aliases and constants are left out.

    Raises:
        ValueError: for a name that neither architecture has.
    """
    architecture = recognise(public) or ARCHITECTURES[0]
    ours = {}
    for name, value in public.items():
        if is_constant(name) or without_alias(name) != name:
            continue
        own = to_our_name(name, architecture)
        if own is None:
            raise ValueError(f"{architecture} has no parameter {name!r}")
        ours[own] = value
    return ours


def to_public_names(ours: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Our state dict under public names, in the public order; each alias follows the weights that it repeats.

    Raises:
        ValueError: for a name that the architecture does not have.
    """
    named: dict[str, Tensor] = {}
    for name, value in ours.items():
        public = to_public_name(name, architecture)
        if public is None:
            raise ValueError(f"{architecture} has no parameter {name!r}")
        named[public] = value
    ordered: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}
    for name in sorted(named, key=lambda name: public_order(name, architecture)):
        alias = alias_of(name)
        if alias is None:
            ordered |= waiting
            waiting = {}
        else:
            waiting[alias] = named[name]
        ordered[name] = named[name]
    return ordered | waiting
