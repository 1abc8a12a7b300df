"""The graph IR: types, ops, functions, text, verification, reference execution and cost."""

from moec.ir import ops as ops
from moec.ir.attrs import Range as Range
from moec.ir.builder import Builder as Builder
from moec.ir.graph import Function as Function
from moec.ir.graph import Module as Module
from moec.ir.interp import Interpreter as Interpreter
from moec.ir.op import OPS as OPS
from moec.ir.op import Cost as Cost
from moec.ir.op import Op as Op
from moec.ir.op import Value as Value
from moec.ir.text import parse_module as parse_module
from moec.ir.text import print_module as print_module
from moec.ir.text import read_module as read_module
from moec.ir.types import CacheType as CacheType
from moec.ir.types import DType as DType
from moec.ir.types import TensorType as TensorType
from moec.ir.verify import verify as verify
