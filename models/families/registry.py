"""Where families announce themselves: which ``model_type`` they read and which presets they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import MoecError, SpecError, UnknownPreset, nearest
from moec.models.blocks import MoE
from moec.models.blocks.base import made_from
from moec.models.config import Config
from moec.models.spec import Model

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A published model by name: the fields of its config.json."""

    name: str
    family: str
    fields: Fields

    @property
    def summary(self) -> str:
        """``61 layers of 7168, 8 of 256 experts``."""
        f = self.fields
        experts = f.get("n_routed_experts") or f.get("num_local_experts") or f.get("num_experts")
        size = f"{f['num_hidden_layers']} layers of {f['hidden_size']}"
        return size + (f", {f['num_experts_per_tok']} of {experts} experts" if experts else ", dense")


@dataclass(frozen=True)
class Family:
    """One architecture. ``presets`` are the fields of config.json by preset name, as published.

    ``tiny`` is the preset with every feature of the family at minute dimensions.
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Config], Model]
    presets: Mapping[str, Fields]
    tiny: str


FAMILIES: dict[str, Family] = {}
PRESETS: dict[str, Preset] = {}


def register(family: Family) -> Family:
    for other in FAMILIES.values():
        mine, theirs = {*family.presets, *family.model_types}, {*other.presets, *other.model_types}
        shared = mine & theirs
        if shared:
            raise RuntimeError(f"{other.name} and {family.name} both register {', '.join(sorted(shared))}")
    FAMILIES[family.name] = family
    for name, fields in family.presets.items():
        PRESETS[name] = Preset(name, family.name, fields)
    return family


def preset_fields(name: str) -> dict[str, Any]:
    """The config.json of a preset. Raises UnknownPreset with the nearest names."""
    if name not in PRESETS:
        raise UnknownPreset(f"no preset is called {name!r}{nearest(name, PRESETS)}")
    return dict(PRESETS[name].fields)


def preset(name: str) -> Model:
    """The model of that name at its published dimensions. Raises UnknownPreset with the nearest names."""
    return read_model(Config(preset_fields(name), f"preset {name}", name=name))


def read_model(config: Config) -> Model:
    """The model that a config describes. Raises UnsupportedModel or ConfigContradiction, naming the field."""
    family = _family(config)
    try:
        with made_from(config.loc):
            model = family.read(config)
    except SpecError as error:  # a block's check: two fields don't go together
        raise config.contradiction(error.message) from None
    except MoecError as error:
        raise error.at(config.loc) from None
    _need_kinds(config, model)
    config.finish()
    return model


def _need_kinds(c: Config, model: Model) -> None:
    """What a config says of each layer's kind is what was built, whether or not the family reads it."""
    attn = ["sliding" if getattr(x.attn, "window", 0) else "full" for x in model.layers]
    built = {
        "layer_types": [f"{kind}_attention" for kind in attn],
        "mlp_layer_types": ["sparse" if isinstance(x.mlp, MoE) else "dense" for x in model.layers],
    }
    for field, kinds in built.items():
        said = c.items(field, str, default=kinds)
        c.need(
            len(said) == len(kinds), f"{field} names {len(said)} layers, num_hidden_layers is {len(kinds)}"
        )
        for i, (want, have) in enumerate(zip(said, kinds, strict=True)):
            if want != have:
                raise c.unsupported(
                    f"{c.path(field)}[{i}] is {want!r}: the other fields make it {have!r} in a "
                    f"{c.data.get('model_type')} model"
                )


def _family(config: Config) -> Family:
    known = {t: f for f in FAMILIES.values() for t in f.model_types}
    model_type = config.text("model_type", default="")
    if model_type not in known:
        said = f"model_type is {model_type!r}" if model_type else "there is no model_type"
        raise config.unsupported(f"{said}{nearest(model_type, known)}; moec reads {', '.join(sorted(known))}")
    for architecture in config.items("architectures", str):
        if not architecture.endswith(("ForCausalLM", "Model")):
            raise config.unsupported(
                f"architectures names {architecture!r}: moec compiles models for causal language modelling"
            )
    return known[model_type]
