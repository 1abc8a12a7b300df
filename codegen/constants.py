"""What the analytic model of seconds (select.py) assumes beside the device's facts.

Not one of them is fitted to a shape. ``moec tune`` fits them to a device's measurements (``moec/tune``); a
tuning file carries what it found.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """The defaults are assumptions: nothing has been measured.

    latency       s, from asking DRAM under load to having the bytes
    prologue      s, a program's search for its tile, its first loads and its last stores
    stores        s of it that a persistent program takes for each tile: other loads are on their way by then
    sm_bandwidth  bytes/s that one SM can take in: about 64 a cycle
    triton        of the matrix unit's throughput, what a pipelined loop sustains
    shows         of the work that runs beside the slowest part, what shows nevertheless
    """

    latency: float = 1e-6
    prologue: float = 2e-6
    stores: float = 0.5e-6
    sm_bandwidth: float = 100e9
    triton: float = 0.75
    shows: float = 0.1


ASSUMED = Constants()
SHARES = {"triton", "shows"}  # they are 1 at most
