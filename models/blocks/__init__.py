"""The building blocks of models, one idea a file."""

from moec.models.blocks.base import Block as Block
from moec.models.blocks.decoder import Decoder as Decoder
from moec.models.blocks.gqa import GQA as GQA
from moec.models.blocks.mla import MLA as MLA
from moec.models.blocks.moe import Experts as Experts
from moec.models.blocks.moe import MoE as MoE
from moec.models.blocks.norm import RMSNorm as RMSNorm
from moec.models.blocks.rope import LinearRoPE as LinearRoPE
from moec.models.blocks.rope import Llama3RoPE as Llama3RoPE
from moec.models.blocks.rope import RoPE as RoPE
from moec.models.blocks.rope import YaRN as YaRN
from moec.models.blocks.router import Router as Router
from moec.models.blocks.swiglu import SwiGLU as SwiGLU
