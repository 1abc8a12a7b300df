"""What kernels become, read from their SASS; a bad twin for each good case: no fact is always the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.errors import CompileFailed, CompilerMissing
from moec.runtime import sass
from moec.runtime.arguments import expand
from moec.runtime.kernel_cache import Cubin
from moec.runtime.sass import KernelFacts, Parameter, count, facts, parameters


@pytest.mark.parametrize(
    ("name", "matrix", "load"),
    [
        ("product sm_80", "HMMA.16816", "LDGSTS.128"),
        ("product sm_90a", "HGMMA.64x128x16", "LDGSTS.128"),
        ("product_tma sm_90a", "HGMMA.64x128x16", "UTMALDG.2D"),
        ("product_tma sm_100a", "UTCHMMA", "UTMALDG.2D"),
    ],
)
def test_products_use_the_matrix_unit(name: str, matrix: str, load: str, built: dict[str, Cubin]) -> None:
    found = built[name].facts
    assert list(found.matrix) == [matrix] and found.matrix[matrix] > 0
    assert set(found.loads) == {load}
    assert (found.spills, found.stack_bytes) == (0, 0)
    assert 0 < found.registers <= 255 and found.barriers["BAR"] > 0
    assert not found.serialised
    assert found.shared_dynamic == built[name].metadata["shared"] > 0


def test_spills_are_seen(built: dict[str, Cubin]) -> None:
    found = built["product of few registers"].facts
    assert found.registers <= 64
    assert found.spill_stores > 0 and found.spill_loads > 0 and found.stack_bytes > 0
    assert found.spills == found.spill_stores + found.spill_loads


def test_a_copy_is_wide_with_promises_and_narrow_without(built: dict[str, Cubin]) -> None:
    wide, narrow = built["copy sm_90a"].facts, built["copy without promises"].facts
    assert (wide.loads, wide.stores) == ({"LDG.128": 1}, {"STG.128": 1})
    assert (narrow.loads, narrow.stores) == ({"LDG.16": 8}, {"STG.16": 8})
    assert not wide.matrix and not wide.barriers and not wide.shared_dynamic


def test_a_cubins_parameters(built: dict[str, Cubin]) -> None:
    cubin = built["copy sm_90a"]
    assert parameters(cubin.data) == [
        Parameter(0, 8),
        Parameter(8, 8),
        Parameter(16, 4),
        Parameter(24, 8),
        Parameter(32, 8),
    ]
    for cubin in built.values():
        assert [p.size for p in parameters(cubin.data)] == [size for _, size in expand(cubin.metadata)]


def test_instructions_are_counted_by_kind() -> None:
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R4.64] ;
        /*0030*/               @P1 LDG.E R8, desc[UR4][R4.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R4.64], P0 ;
        /*0050*/             @!UP1 UTMALDG.3D [UR8], [UR14] ;
        /*0060*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24, !UPT ;
        /*0070*/                   UTCQMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10], !UPT ;
        /*0080*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;
        /*0090*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5 ;
        /*00a0*/                   STL.64 [R1], R2 ;
        /*00b0*/                   LDL.LU.64 R2, [R1] ;
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00e0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00f0*/                   FFMA R2, R3, R4, R5 ;
        /*0100*/              @!P1 STL.64 [R1+0x8], RZ ;
        /*0110*/                   WARPGROUP.ARRIVE ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    """
    counts = count(text)
    assert sum(counts.pop("all").values()) == 19
    assert counts == {
        "loads": {"LDG.16": 1, "LDG.128": 1, "LDG.32": 1, "LDGSTS.128": 1, "UTMALDG.3D": 1},
        "matrix": {"QGMMA.64x64x32": 1, "UTCQMMA": 1},
        "atomics": {"RED": 1, "ATOMG": 1},
        "spill_stores": {"STL": 1},
        "spill_loads": {"LDL": 1},
        "barriers": {"BAR": 1, "SYNCS": 1, "WARPGROUP.DEPBAR": 1},
        "stores": {"STG.64": 1},
    }


def test_facts_survive_a_manifest(built: dict[str, Cubin]) -> None:
    cubin = built["product sm_90a"]
    written = json.loads(json.dumps(cubin.as_manifest()))
    assert (
        KernelFacts.from_manifest(written["facts"])
        == cubin.facts
        == facts(cubin.data, cubin.metadata["shared"])
    )
    assert (written["kernel"], written["arch"]) == ("product", "sm_90a")


def test_what_is_no_cubin_and_what_has_no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CompileFailed, match="can't read the cubin"):
        facts(b"\x7fELF, or so it says")
    sass.tool.cache_clear()
    monkeypatch.setenv("TRITON_CUOBJDUMP_PATH", str(tmp_path / "absent"))
    with pytest.raises(CompilerMissing, match="cuobjdump isn't a program at"):
        facts(b"")
    sass.tool.cache_clear()
