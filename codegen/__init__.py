"""From optimised IR to a package's sources: kernel records, Jinja templates, emission."""

from moec.codegen.package import staging as staging
from moec.codegen.package import write_package as write_package
from moec.codegen.records import KernelRecords
from moec.codegen.targets import TARGETS as TARGETS
from moec.codegen.targets import Target as Target
from moec.codegen.targets import target as target
from moec.ir.records import provide

provide(KernelRecords())
