"""The plots of a race: ``python bench/plots.py bench/results/X.json [FOLDER]``, into ``docs`` unless told otherwise.

Each is drawn twice, for light and for dark pages, on a transparent background: ``race-light.svg``, ``race-dark.svg``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from report import figure_of

try:
    import matplotlib as mpl
except ImportError:
    sys.exit("plots need matplotlib: scripts/bench-peers.sh installs it")

mpl.use("svg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
PROXIES = ("nginx", "HAProxy", "Envoy")
# What the plot shows of fastdist, by work, in the order it is drawn.
SMALL = {
    "batch, memory": "batch, memory",
    "batch, disk": "batch, disk",
    "batch, fsync": "batch, fsync",
    "single, pipeline 8": "single, pipeline 8, memory",
    "single": "single, memory",
    "single, disk (the default)": "single, disk (the default)",
}
LARGE = {
    "18 KB, batch": "batch, memory",
    "18 KB, batch, disk": "batch, disk",
    "18 KB, batch, validation none": "batch, memory, unchecked",
    "18 KB, batch, disk, validation none": "batch, disk, unchecked",
}
MIXED = {"0.2-60 KB, batch, memory": "batch, memory", "0.2-60 KB, batch, disk": "batch, disk"}
LATENCIES = {
    "latency, batch, memory": ("fastdist", "fastdist, batch, memory"),
    "latency, single, disk (the default)": ("fastdist", "fastdist, single, disk"),
}
PERCENTILES = {"p50": "median", "p90": "90 %", "p99": "99 %", "p999": "99.9 %"}


class Theme(NamedTuple):
    """Colours: text, quiet text, lines, fastdist, the proxies, the limit."""

    name: str
    text: str
    quiet: str
    line: str
    ours: str
    theirs: str
    limit: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#8c959f", "#bc4c00"),
    Theme("dark", "#e6edf3", "#9198a1", "#3d444d", "#4493f8", "#656c76", "#e3873f"),
)


class Bar(NamedTuple):
    """A bar: its label, value, least and most of the rounds."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


def bars_of(rows: dict[str, Any], ours: dict[str, str]) -> list[Bar]:
    """Return fastdist's bars for these works, then the peers'."""
    found = [_bar(rows, work, "fastdist", f"fastdist: {label}") for work, label in ours.items()]
    peers = [_bar(rows, next(iter(ours)), name, name) for name in (*PROXIES, "Express")]
    return [bar for bar in (*found, *peers) if bar]


def _bar(rows: dict[str, Any], work: str, contestant: str, label: str) -> Bar | None:
    value = figure_of(rows, work, contestant, "per_cpu")
    if value is None:
        return None
    low, high = rows[work]["contestants"][contestant]["spread"]["per_cpu"]
    return Bar(label, value, low, high, contestant == "fastdist")


def draw_bars(axes: Axes, bars: list[Bar], theme: Theme, title: str, limit: float | None) -> None:
    """Draw one kind of load."""
    places = [index + 0.5 * (not bar.ours) for index, bar in enumerate(bars)]
    colours = [theme.ours if bar.ours else theme.theirs for bar in bars]
    axes.barh(places, [bar.value for bar in bars], color=colours, height=0.7)
    most = max(bar.high for bar in bars)
    for place, bar in zip(places, bars, strict=True):
        axes.plot([bar.low, bar.high], [place, place], color=theme.text, linewidth=1, solid_capstyle="butt", alpha=0.7)
        axes.text(bar.high + most * 0.015, place, f"{bar.value:,.0f}", va="center", fontsize=9, color=theme.text)
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=9.5, color=theme.text)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10.5, color=theme.text, fontweight="bold")
    axes.set_xlim(0, most * 1.13)
    if limit:
        axes.set_xlim(0, max(most, limit) * 1.13)
        axes.axvline(limit, color=theme.limit, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(
            limit * 0.985,
            places[-1],
            f"C that only answers\n{limit:,.0f}",
            va="bottom",
            ha="right",
            fontsize=8.5,
            color=theme.limit,
        )
    tidy(axes, theme)


def tidy(axes: Axes, theme: Theme) -> None:
    """Leave only what is needed."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.tick_params(axis="both", length=0, colors=theme.quiet, labelcolor=theme.text)
    axes.tick_params(axis="x", labelcolor=theme.quiet, labelsize=8.5)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.grid(visible=True, axis="x", color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)


def race_plot(rows: dict[str, Any], theme: Theme) -> Figure | None:
    """Packets per CPU-second, by contestant and work."""
    panels = {
        "452-byte packets": (SMALL, "batch, memory"),
        "18 KB packets": (LARGE, "18 KB, batch"),
        "packets of 0.2 to 60 KB": (MIXED, "0.2-60 KB, batch, memory"),
    }
    drawn = {title: (bars_of(rows, ours), work) for title, (ours, work) in panels.items()}
    drawn = {title: (bars, work) for title, (bars, work) in drawn.items() if bars}
    if not drawn:
        return None
    heights = [len(bars) + 1.5 for bars, _ in drawn.values()]
    figure: Figure
    figure, all_axes = plt.subplots(
        len(drawn),
        1,
        figsize=(8.6, sum(heights) * 0.33 + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, (bars, work)) in zip(all_axes[:, 0], drawn.items(), strict=True):
        draw_bars(axes, bars, theme, title, figure_of(rows, work, "limit", "per_cpu"))
    widest = max(axes.get_xlim()[1] for axes in all_axes[:, 0])
    for axes in all_axes[:, 0]:
        axes.set_xlim(0, widest)
    all_axes[-1, 0].set_xlabel("packets delivered per second of processor time (thin line: all rounds)", fontsize=9)
    all_axes[-1, 0].xaxis.label.set_color(theme.quiet)
    return figure


def latency_plot(rows: dict[str, Any], theme: Theme) -> Figure | None:
    """Percentiles of the answer's latency at a fixed rate."""
    series = {label: (work, who) for work, (who, label) in LATENCIES.items()}
    series |= {name: (next(iter(LATENCIES)), name) for name in ("nginx", "HAProxy")}
    values = {
        label: [value for name in PERCENTILES if (value := figure_of(rows, work, who, name)) is not None]
        for label, (work, who) in series.items()
    }
    values = {label: each for label, each in values.items() if len(each) == len(PERCENTILES)}
    if not values:
        return None
    figure: Figure
    figure, axes = plt.subplots(figsize=(8.6, 3.2), layout="constrained")
    styles = iter(((theme.ours, "-"), (theme.ours, ":"), (theme.quiet, "-"), (theme.quiet, ":")))
    for label, each in values.items():
        colour, line = next(styles)
        axes.plot(range(len(each)), each, line, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axes.set_yscale("log")
    tidy(axes, theme)
    axes.set_xticks(range(len(PERCENTILES)), list(PERCENTILES.values()))
    axes.grid(visible=True, axis="y", color=theme.line, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g} ms")
    axes.tick_params(axis="y", which="both", length=0, labelcolor=theme.quiet, labelsize=8.5)
    axes.set_title(
        "Time until the answer, 10,000 packets/s (open loop)",
        loc="left",
        fontsize=10.5,
        color=theme.text,
        fontweight="bold",
    )
    axes.legend(frameon=False, fontsize=9, labelcolor=theme.text)
    return figure


def main() -> int:
    """Draw the plots of a race that was run before."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path)
    options.add_argument("folder", type=Path, nargs="?", default=DOCS)
    chosen = options.parse_args()
    rows = json.loads(chosen.results.read_text())["works"]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    # Text stays text: smaller, and drawn with the reader's own fonts. The same figures give the same file.
    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "race", "font.family": "sans-serif", "axes.facecolor": "none"}
    )
    for name, plot in {"race": race_plot, "race-latency": latency_plot}.items():
        for theme in THEMES:
            figure = plot(rows, theme)
            if figure is None:
                continue
            target = chosen.folder / f"{name}-{theme.name}.svg"
            figure.savefig(target, transparent=True, metadata={"Date": None})
            plt.close(figure)
            print(f"drawn: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
