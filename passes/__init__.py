"""Rewrites over the IR, the pattern matcher and the pass manager.

A pass is one file in this folder::

    '''The shape that it matches, and what it becomes.'''

    @dataclass(frozen=True)
    class Options:
        block: int = 128  # rows and columns that share a scale

    def once(m: Match) -> Value:
        return m.create("cast", m["x"], to=m["c"].attrs["to"])

    RULES: Rules = {
        "twice": (P.cast(P.cast("x", to=ANY), to=ANY).named("c"), once),  # cast(cast(x)) -> cast(x)
    }

    @register
    class MyPass(Pass):
        '''One line for ``moec list``.'''

        name = "my-pass"
        Options = Options

        def run(self, module: Module) -> bool:
            return self.apply(module, RULES)

Importing this package registers it: ``parse_pipeline("my-pass{block=64}")`` then knows it. Give it its
place in ``pipelines.py`` and, for each rule, a golden pair and a near miss in ``tests/passes``."""

from importlib import import_module
from pkgutil import iter_modules

from moec.passes.instruments import Dump as Dump
from moec.passes.instruments import Events as Events
from moec.passes.instruments import Oracle as Oracle
from moec.passes.manager import PASSES as PASSES
from moec.passes.manager import Instrument as Instrument
from moec.passes.manager import Pass as Pass
from moec.passes.manager import PassManager as PassManager
from moec.passes.manager import PassRun as PassRun
from moec.passes.manager import parse_pipeline as parse_pipeline
from moec.passes.manager import print_pipeline as print_pipeline
from moec.passes.manager import register as register
from moec.passes.pattern import Miss as Miss
from moec.passes.pipelines import pipeline as pipeline

for _module in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
