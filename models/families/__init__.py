"""The model families, one file each. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from moec.models.families.registry import FAMILIES as FAMILIES
from moec.models.families.registry import PRESETS as PRESETS
from moec.models.families.registry import Family as Family
from moec.models.families.registry import preset as preset
from moec.models.families.registry import preset_fields as preset_fields
from moec.models.families.registry import read_model as read_model

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
