"""What a built package runs on; imports no other part of moec."""

from moec.runtime.batch import Batch as Batch
from moec.runtime.cache import KVCache as KVCache
from moec.runtime.model import LanguageModel as LanguageModel
from moec.runtime.model import LayerModel as LayerModel
from moec.runtime.model import load as load
