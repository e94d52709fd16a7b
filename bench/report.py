"""What a race found, as tables: ``python bench/report.py bench/results/X.json [--markdown]``.

``summary`` makes the document that is written to ``bench/results``; the tables are made of nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from works import Aim, Run, Work

Document = dict[str, Any]
PROXIES = ("nginx", "HAProxy", "Envoy")
COLUMNS = ("fastdist", "before", *PROXIES, "Express", "limit")
FIGURES = {
    "worst": ("longest answer, ms", "{:,.1f}"),
    "errors": ("errors that emitters saw", "{:,.0f}"),
    "pause": ("longest pause, ms", "{:,.1f}"),
    "per_cpu": ("packets per CPU-second", "{:,.0f}"),
    "per_cpu_of_all": ("the servers' too", "{:,.0f}"),
    "of_bare": ("p50 at 1,000/s, of the stream's", "{:,.2f}"),
    "records_per_cpu": ("records per CPU-second", "{:,.0f}"),
    "of_decoding": ("processor time of decoding alone", "{:,.2f}"),
    "accepted_per_second": ("packets accepted per second", "{:,.0f}"),
    "p99": ("latency p99, ms", "{:,.2f}"),
    "p999": ("latency p99.9, ms", "{:,.2f}"),
    "charged_mib": ("MiB of memory", "{:,.0f}"),
    "bytes_each": ("bytes per connection", "{:,.0f}"),
}


# ----------------------------------------------------------------------------------------------- from rounds to figures


def summary(works: list[Work], measured: dict[Run, list[Document]], failures: dict[Run, list[str]]) -> Document:
    """Return every work with each contestant's median and spread, and what became of the aims."""
    rows: Document = {}
    for work in works:
        contestants = {}
        for run in work.runs:
            if rounds := measured.get(run):
                contestants[run.contestant.name] = _of_rounds(rounds, failures.get(run, []))
            elif run in failures:
                contestants[run.contestant.name] = {"failed": failures[run][-1]}
        rows[work.name] = {
            "figure": work.figure,
            "load": work.load._asdict(),
            "settings": work.settings,
            "contestants": contestants,
        }
    for work in works:
        with_before = "before" in rows[work.name]["contestants"]
        aims = [aim for aim in work.aims if with_before or aim.against != "before"]
        rows[work.name]["aims"] = [_judged(aim, work, rows) for aim in aims]
    return rows


def _of_rounds(rounds: list[Document], failures: list[str]) -> Document:
    numbers = [name for name, value in rounds[0].items() if isinstance(value, int | float)]
    values = {name: [each[name] for each in rounds if name in each] for name in numbers}
    result: Document = {
        "median": {name: median(each) for name, each in values.items()},
        "spread": {name: [min(each), max(each)] for name, each in values.items()},
        "rounds": rounds,
    }
    return result | ({"failures": failures} if failures else {})


def figure_of(rows: Document, work: str, contestant: str, figure: str) -> float | None:
    """Return a median, None if there are no values."""
    found = rows.get(work, {}).get("contestants", {}).get(contestant, {}).get("median", {}).get(figure)
    return None if found is None else float(found)


def _opponents(aim: Aim, work: Work, rows: Document) -> dict[str, float]:
    """Return the figures that an aim may be about, by whose they are."""
    if aim.against == "best" or aim.against in COLUMNS:
        names = PROXIES if aim.against == "best" else (aim.against,)
        found = {name: figure_of(rows, work.name, name, aim.figure) for name in names}
    else:
        found = {aim.against: figure_of(rows, aim.against, "fastdist", aim.figure)}
    return {name: value for name, value in found.items() if value}


def _judged(aim: Aim, work: Work, rows: Document) -> Document:
    ours = figure_of(rows, work.name, "fastdist", aim.figure)
    result: Document = {"against": aim.against, "figure": aim.figure, "wanted": aim.text, "value": None, "met": None}
    opponents = _opponents(aim, work, rows)
    if ours is None or (aim.against and not opponents):
        return result
    if aim.against:
        choose = max if aim.at_least is not None else min
        result["against"] = choose(opponents, key=opponents.__getitem__)
        value = ours / opponents[result["against"]]
    else:
        value = ours
    absent = [name for name in PROXIES if name not in opponents] if aim.against == "best" else []
    return result | {"of": aim.against, "value": value, "met": aim.met(value), "absent": absent}


# ------------------------------------------------------------------------------------------------------------- tables


def tables(document: Document) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, names of columns, rows) of each table."""
    rows = document["works"]
    peers = {name: row for name, row in rows.items() if row["figure"] == "per_cpu" and _has_peers(row)}
    others = {name: row for name, row in rows.items() if name not in peers}
    ran = {name for row in rows.values() for name in row["contestants"]}
    columns = [name for name in COLUMNS if name != "before" or name in ran]
    few = [name for name in columns if name in {"fastdist", "before", *PROXIES[:2]}]
    return [
        (
            "Packets per CPU-second, and how many times that fastdist delivers",
            ["work", *columns],
            [[name, *(_cell(row, column) for column in columns)] for name, row in peers.items()],
        ),
        (
            "Answers meanwhile, p50, p99 and p99.9 in ms",
            ["work", *columns],
            [[name, *(_answers(row, column) for column in columns)] for name, row in peers.items()],
        ),
        (
            "Everything else",
            ["work", "figure", *few],
            [
                [name, FIGURES[row["figure"]][0], *(_cell(row, column) for column in few)]
                for name, row in others.items()
            ],
        ),
        ("Aims", ["work", "of", "against", "measured", "aim", ""], _aims(rows)),
    ]


def _has_peers(row: Document) -> bool:
    return any(name in row["contestants"] for name in ("before", *PROXIES))


def _cell(row: Document, contestant: str) -> str:
    """Return the median, with the spread for fastdist and fastdist's ratio for the others."""
    found = row["contestants"].get(contestant)
    if found is None:
        return ""
    if "failed" in found:
        return "failed"
    figure = row["figure"]
    form = FIGURES[figure][1]
    value = found["median"][figure]
    text = form.format(value)
    if contestant == "fastdist":
        low, high = found["spread"][figure]
        return f"{text} ({form.format(low)}-{form.format(high)})" if len(found["rounds"]) > 1 else text
    ours = row["contestants"].get("fastdist", {}).get("median", {}).get(figure)
    return f"{text} (x{ours / value:.2f})" if ours and value else text


def _answers(row: Document, contestant: str) -> str:
    """Return how long answers took: medians of the rounds."""
    found = row["contestants"].get(contestant, {}).get("median", {})
    return " / ".join(f"{found[name]:.1f}" for name in ("p50", "p99", "p999") if name in found)


def _aims(rows: Document) -> list[list[str]]:
    result = []
    for name, row in rows.items():
        for aim in row["aims"]:
            against = f"{aim['against']} (the best)" if aim.get("of") == "best" else aim["against"]
            kind, form = FIGURES[aim["figure"]]
            value = (
                "not measured"
                if aim["value"] is None
                else (f"{aim['value']:.2f}" if against else form.format(aim["value"]))
            )
            verdict = {None: "", True: "met", False: "missed"}[aim["met"]]
            if aim.get("absent"):
                verdict += f" (without {', '.join(aim['absent'])})"
            result.append([name, kind, against or "(as it is)", value, aim["wanted"], verdict])
    return result


def remarks(document: Document) -> list[str]:
    """Return what has to be known to read the figures."""
    found = [f"{name} did not run: {why}" for name, why in document["missing"].items()]
    for name, row in document["works"].items():
        for contestant, figures in row["contestants"].items():
            if "failed" in figures:
                found.append(f"{name}: {contestant} failed: {figures['failed']}")
            failures = figures.get("failures", [])
            found.extend(f"{name}: {contestant} failed in a round that does not count: {text}" for text in failures)
            late = figures.get("median", {}).get("late_p99", 0)
            if late > figures.get("median", {}).get("p99", 0) / 2:
                found.append(f"{name}: with {contestant} the load itself was late (p99 {late:.1f} ms): a busy machine")
            if errors := figures.get("median", {}).get("errors", 0):
                found.append(f"{name}: emitters of {contestant} saw {errors:g} errors")
            if any(each.get("held_back") for each in figures.get("rounds", [])):
                found.append(f"{name}: wrk could not keep {contestant} busy; it might do better")
    return list(dict.fromkeys(found))


def show(document: Document, *, markdown: bool = False) -> None:
    """Print everything."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for title, columns, rows in tables(document):
        if not rows:
            continue
        if markdown:
            lines = [f"**{title}**", "", _line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
            print("\n".join([*lines, *map(_line, rows), ""]))
            continue
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "work" else "right")
        for row in rows:
            table.add_row(*row, style="red" if row[-1].startswith("missed") else "")
        console.print(table)
    for remark in remarks(document):
        print(f"- {remark}")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Show a race that was run before."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path)
    options.add_argument("--markdown", action="store_true", help="tables for a README")
    chosen = options.parse_args()
    show(json.loads(chosen.results.read_text()), markdown=chosen.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
