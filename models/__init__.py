"""The model DSL, its building blocks and the model families.

A model is a frozen dataclass made of frozen dataclasses::

    import moec.models as m

    layer = m.Decoder(
        attn=m.GQA(heads=8, kv_heads=2, head_dim=64),
        mlp=m.MoE(m.Router(experts=16, top_k=2, renorm=True), m.Experts(count=16, intermediate=256)),
    )
    model = m.Model(vocab=32000, hidden=512, layers=[layer] * 6)
    module = m.lower(model)
"""

from moec.models.blocks import GQA as GQA
from moec.models.blocks import MLA as MLA
from moec.models.blocks import Block as Block
from moec.models.blocks import Decoder as Decoder
from moec.models.blocks import Experts as Experts
from moec.models.blocks import LinearRoPE as LinearRoPE
from moec.models.blocks import Llama3RoPE as Llama3RoPE
from moec.models.blocks import MoE as MoE
from moec.models.blocks import RMSNorm as RMSNorm
from moec.models.blocks import RoPE as RoPE
from moec.models.blocks import Router as Router
from moec.models.blocks import SwiGLU as SwiGLU
from moec.models.blocks import YaRN as YaRN
from moec.models.families import PRESETS as PRESETS
from moec.models.families import preset as preset
from moec.models.intake import from_hf as from_hf
from moec.models.intake import resolve as resolve
from moec.models.lower import lower as lower
from moec.models.quantization import BlockFP8 as BlockFP8
from moec.models.spec import Layer as Layer
from moec.models.spec import Model as Model
