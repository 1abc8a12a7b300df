"""What a user may name as a spec: a preset, a Hugging Face folder, a model file of their own, an object."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from moec.errors import ConfigUnreadable, SourceLoc, SpecError, UnknownPreset, nearest
from moec.models.config import Config, read_json
from moec.models.families import PRESETS, preset, read_model
from moec.models.spec import Layer, Model, Spec
from moec.models.userfile import load_spec


def resolve(spec: str | PathLike[str] | Spec) -> Spec:
    """The model that ``spec`` names::

        deepseek-v3                     a preset
        path/to/checkpoint              a Hugging Face folder, or its config.json
        my_model.py:model               a Model, a Layer or a function that returns one, in a Python file

    A preset's name goes before a folder's; ``./deepseek-v3`` is the folder.
    """
    if isinstance(spec, Model | Layer):
        return spec
    if not isinstance(spec, str | PathLike):
        raise SpecError(f"{spec!r} is no spec: a preset's name, a path, a Model or a Layer is")
    text = str(spec)
    if not text.strip():
        raise UnknownPreset("the spec is empty: a preset's name or a path is one")
    if text in PRESETS:
        return preset(text)
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        return load_spec(file, name)
    if text.endswith(".py"):
        return load_spec(text, "")
    if Path(text).exists() or text.endswith(".json"):
        return from_hf(text)
    raise UnknownPreset(
        f"{text!r} is no preset, folder or file{nearest(text.lower(), PRESETS)}",
        notes=[f"presets: {', '.join(PRESETS)}"],
    )


def from_hf(path: str | PathLike[str]) -> Model:
    """The model that a Hugging Face folder, or a config.json by itself, describes; named after its folder.

    Weights aren't read. Raises ConfigUnreadable, ConfigContradiction or UnsupportedModel, by file and field.
    """
    place = Path(path)
    file = place / "config.json" if place.is_dir() else place
    if place.is_dir() and not file.exists():
        raise ConfigUnreadable("the folder has no config.json", loc=SourceLoc(str(place), 0))
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    model = read_model(Config(read_json(file), str(file), name=name or "model"))
    return _with_generation_eos(model, file.parent / "generation_config.json")


def _with_generation_eos(model: Model, file: Path) -> Model:
    """generation_config.json, where there is one, says what ends a text: chat models add ids there."""
    if not file.exists():
        return model
    eos = Config(read_json(file), str(file)).ids("eos_token_id", model.vocab)
    return replace(model, eos=eos) if eos else model
