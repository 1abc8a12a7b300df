"""Where families announce themselves: which ``model_type`` they read and which presets they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import MoecError, SpecError, UnknownPreset, nearest
from moec.models.config import Config
from moec.models.spec import Model

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture. ``presets`` are the fields of config.json by preset name, as published; ``tiny`` is the
    preset with every feature of the family at minute dimensions."""

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Config], Model]
    presets: Mapping[str, Fields]
    tiny: str


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    for other in FAMILIES.values():
        shared = {*other.presets} & {*family.presets} | {*other.model_types} & {*family.model_types}
        if shared:
            raise RuntimeError(f"{other.name} and {family.name} both register {', '.join(sorted(shared))}")
    FAMILIES[family.name] = family
    return family


def preset_names() -> list[str]:
    return sorted(name for family in FAMILIES.values() for name in family.presets)


def preset_fields(name: str) -> dict[str, Any]:
    """The config.json of a preset. Raises UnknownPreset with the nearest names."""
    for family in FAMILIES.values():
        if name in family.presets:
            return dict(family.presets[name])
    raise UnknownPreset(f"no preset is called {name!r}{nearest(name, preset_names())}")


def preset(name: str) -> Model:
    """The model of that name at its published dimensions. Raises UnknownPreset with the nearest names."""
    return read_model(Config(preset_fields(name), f"preset {name}", name=name))


def read_model(config: Config) -> Model:
    """The model that a config describes. Raises UnsupportedModel or ConfigContradiction, naming the field."""
    family = _family(config)
    try:
        model = family.read(config)
    except SpecError as error:  # a block's check: two fields don't go together
        raise config.contradiction(error.message) from None
    except MoecError as error:
        raise error.at(config.loc) from None
    config.finish()
    return model


def _family(config: Config) -> Family:
    known = {t: f for f in FAMILIES.values() for t in f.model_types}
    model_type = config.text("model_type", default="")
    if model_type not in known:
        said = f"model_type is {model_type!r}" if model_type else "there is no model_type"
        raise config.unsupported(f"{said}{nearest(model_type, known)}; moec reads {', '.join(sorted(known))}")
    for architecture in config.list("architectures", str):
        if not architecture.endswith(("ForCausalLM", "Model")):
            raise config.unsupported(f"architectures names {architecture!r}: moec compiles models for causal language modelling")
    return known[model_type]
