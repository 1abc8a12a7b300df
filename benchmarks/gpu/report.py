"""What a run leaves: one JSON, one plot, and a short table at the end of its output."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu import goals

PACKAGES = ["triton", "transformers", "liger-kernel", "vllm", "sglang"]
COLOURS = ["#c1272d", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b"]
COLOURS += ["#222222", "#5e3c99", "#b8a400", "#7fbf7b", "#8da0cb", "#e78ac3"]

Result = dict[str, Any]


def device_name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name()


def versions() -> dict[str, str]:
    import moec

    found = {
        "moec": moec.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def header(device: str, dtype: str) -> Result:
    return {
        "device": device_name(device),
        "self_test": device == "cpu",
        "date": date.today().isoformat(),
        "versions": versions(),
        "dtype": dtype,
    }


def file_stem(device: str, *marks: str) -> str:
    """``moe_layer.nvidia-h100-80gb-hbm3``, and what is unusual about the run: ``.fp16.quick``."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return ".".join(["moe_layer", "self-test" if device == "cpu" else name, *marks])


def write(result: Result, folders: list[Path], stem: str) -> list[Path]:
    """The JSON and, where matplotlib is installed, the plot, in every folder."""
    written = []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{stem}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        written.append(file)
        if plot(result, folder / f"{stem}.png"):
            written.append(folder / f"{stem}.png")
    return written


# The table.
def table(result: Result) -> list[str]:
    """Of each shape and number of tokens: moec, the best peer, and how far moec is from the roof."""
    lines = [
        f"{result['device']}, {result['dtype']}, {result['date']}, from the router's {result['from']} to y",
        f"roofs, measured: {result['roofs']['bandwidth'] / 1e12:.3f} TB/s of a copy, "
        f"{result['roofs']['flops'] / 1e12:.2f} TFLOP/s of a matrix product",
        "",
        f"{'shape':<17}{'M':>6}{'moec µs':>11}{'best peer µs':>14}{'× peer':>8}{'floor µs':>10}{'of roof':>9}"
        f"{'TB/s':>8}{'TFLOP/s':>9}  peer",
    ]
    lines += [_row(group) for group in _groups(result)]
    lines += [_against(one) for one in result["summary"]]
    lines += [_variant(one) for one in goals.variants(result)]
    lines += _determinism(result)
    lines += _tuned(result["tuning"])
    lines += goals.lines(result["goals"])
    lines += [f"without {name}: {reason}" for name, reason in result["unavailable"].items()]
    for name in dict.fromkeys(e["implementation"] for e in result["excluded"]):
        first, *more = [e for e in result["excluded"] if e["implementation"] == name]
        others = f", and {len(more)} more" if more else ""
        lines.append(f"left out {name}: {first['reason']} ({first['shape']} M={first['tokens']}{others})")
    slow = dict.fromkeys(r["implementation"] for r in result["results"] if not r["graph"])
    if result["self_test"]:
        lines.append("a self-test on the CPU: these times mean nothing")
    elif slow:
        lines.append(f"outside a CUDA graph, which can't record them: {', '.join(slow)}")
    return lines


def _groups(result: Result) -> Iterator[list[Result]]:
    """The results of one shape and number of tokens together, in order."""
    found: dict[tuple[str, int], list[Result]] = {}
    for one in result["results"]:
        found.setdefault((one["shape"], one["tokens"]), []).append(one)
    yield from found.values()


def _row(group: list[Result]) -> str:
    ours = next((r for r in group if r["implementation"] == "moec"), None)
    others = [r for r in group if not r["implementation"].startswith("moec")]
    peers = sorted(others, key=lambda r: r["median_us"])
    first = group[0]
    cells = [
        f"{first['shape']:<17}{first['tokens']:>6}",
        f"{'-':>11}" if ours is None else f"{ours['median_us']:>11.1f}",
    ]
    cells.append(f"{peers[0]['median_us']:>14.1f}" if peers else f"{'-':>14}")
    cells.append(f"{peers[0]['median_us'] / ours['median_us']:>8.2f}" if peers and ours else f"{'-':>8}")
    cells.append(f"{first['floor_us']:>10.1f}")
    if ours is not None:
        cells.append(
            f"{ours['of_roof']:>9.0%}{ours['bytes_per_s'] / 1e12:>8.3f}{ours['flops_per_s'] / 1e12:>9.2f}"
        )
    else:
        cells.append(f"{'-':>9}{'-':>8}{'-':>9}")
    return "".join(cells) + (f"  {peers[0]['implementation']}" if peers else "")


def _against(one: Result) -> str:
    return (
        f"against {one['peer']}: {one['geometric_mean']:.2f} times as fast in the geometric mean of "
        f"{one['measured']}, at worst {one['worst']:.2f} ({one['shape']} M={one['tokens']})"
    )


def _variant(one: Result) -> str:
    return (
        f"{one['name']}: {one['geometric_mean']:.2f} times as fast as moec in the geometric mean of "
        f"{one['measured']}, at best {one['best']:.2f} ({one['shape']} M={one['tokens']})"
    )


def _tuned(tuning: list[Result]) -> list[str]:
    """Of each peer that was or could have been tuned: how often that helped, and how much."""
    lines = []
    for name in dict.fromkeys(one["implementation"] for one in tuning):
        mine = [one for one in tuning if one["implementation"] == name]
        tried = [one for one in mine if "untuned" not in one]
        gains = [one["own_us"] / one["best_us"] for one in tried if one["config"] and one["own_us"]]
        gain = f", {statistics.geometric_mean(gains):.2f} times as fast there" if gains else ""
        better = sum(one["config"] is not None for one in tried)
        lines.append(f"tuned {name} at {len(tried)} of {len(mine)}: better at {better}{gain}")
        lines += [
            f"not tuned {name}: {why}" for why in dict.fromkeys(o["untuned"] for o in mine if "untuned" in o)
        ]
    return lines


def _determinism(result: Result) -> list[str]:
    """What its results being the same bits costs: in any case nothing, in any batch this."""
    cost = goals.invariance(result)
    if cost is None:
        return []
    mean, worst, count = cost["geometric_mean"], cost["worst"], len(cost["each"])
    return [
        "determinism: equal batches give equal bits always; that a token's bits are its own in any batch "
        f"(batch invariant) takes {mean:.2f} times as long in the geometric mean of {count}, "
        f"at worst {worst['times']:.2f} ({worst['shape']} M={worst['tokens']})"
    ]


# The plot.
def plot(result: Result, file: Path) -> bool:
    """Time over tokens, a panel a shape, with the floor that the roofs set. False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(r["shape"] for r in result["results"]))
    if not shapes:
        return False
    names = list(dict.fromkeys(r["implementation"] for r in result["results"]))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns + 0.4, 3.4 * rows + 1.1), squeeze=False, layout="constrained"
    )
    for panel, shape in zip(axes.flat, shapes, strict=False):
        here = [r for r in result["results"] if r["shape"] == shape]
        floor = {r["tokens"]: r["floor_us"] for r in here}
        panel.plot(list(floor), list(floor.values()), "--", color="#444444", linewidth=1.2, label="floor")
        for name, colour in reversed(list(zip(names, COLOURS, strict=False))):
            mine = [r for r in here if r["implementation"] == name]
            ours = name == "moec"
            panel.plot(
                [r["tokens"] for r in mine],
                [r["median_us"] for r in mine],
                "o-" if ours else ".-",
                color=colour,
                linewidth=2.2 if ours else 1.3,
                markersize=4.5 if ours else 5,
                label=name,
            )
        about = result["shapes"][shape]
        sizes = f"E {about['experts']}, I {about['intermediate']}, H {about['hidden']}, top-{about['top_k']}"
        panel.set_title(f"{shape}   {sizes}", fontsize=9, loc="left")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        panel.tick_params(labelsize=8)
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("µs a layer", fontsize=9)
    for panel in axes.flat[max(0, len(shapes) - columns) : len(shapes)]:
        panel.set_xlabel("tokens", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside lower center",
        ncols=min(5, len(labels)),
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(
        f"The experts of one MoE layer, {result['dtype']} on {result['device']}, {result['date']}"
        + (" (a self-test: times mean nothing)" if result["self_test"] else ""),
        fontsize=10,
    )
    figure.savefig(file, dpi=140)
    pyplot.close(figure)
    return True
