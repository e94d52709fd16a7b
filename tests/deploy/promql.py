"""What a PromQL expression asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import promql_parser as promql

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = {"job", "instance"}  # labels that Prometheus adds
COUNTING = {"rate", "irate", "increase"}  # functions that only make sense of counters
AT_THE_START = {
    "fastdist_packets_recovered_total",
    "fastdist_packets_corrupt_total",
    "fastdist_packets_lost_total",
}  # counted then, read as they are
OF_PROMETHEUS = {"up": ("gauge", set(), {})}


@dataclass
class Selector:
    """A metric that an expression looks at, with its matchers, and the function that it is handed to, if any."""

    name: str
    matchers: list[tuple[str, str]]
    function: str


def children(node) -> Iterator[tuple[object, str]]:
    """Yield what a node is made of, with the function (or "") that is applied to it."""
    if isinstance(node, promql.Call):
        yield from ((each, node.func.name) for each in node.args)
    elif isinstance(node, promql.BinaryExpr):
        yield from ((node.lhs, ""), (node.rhs, ""))
    elif isinstance(node, (promql.AggregateExpr, promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
        yield node.expr, ""
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector, ""


def selectors(node, function="") -> Iterator[Selector]:
    """Yield every metric that an expression looks at."""
    if isinstance(node, promql.VectorSelector):
        yield Selector(node.name or "", [(it.name, it.value) for it in node.matchers.matchers], function)
    for child, applied in children(node):
        yield from selectors(child, applied or (function if isinstance(node, promql.MatrixSelector) else ""))


def groupings(node) -> Iterator[str]:
    """Yield every label that an expression groups or matches by."""
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql.AggregateExpr) and modifier:
        yield from modifier.labels
    if isinstance(node, promql.BinaryExpr) and modifier and modifier.matching:
        yield from modifier.matching.labels
    for child, _ in children(node):
        yield from groupings(child)


def vocabulary(families) -> dict[str, tuple[str, set[str], dict[str, set[str]]]]:
    """Return {sample name: (type, labels, {label: values})} of what a server tells."""
    known = dict(OF_PROMETHEUS)
    for family in families:
        for sample in family.samples:
            _, labels, values = known.setdefault(sample.name, (family.type, set(), {}))
            labels.update(sample.labels)
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    return known


def _matches(pattern: str, values: set[str]) -> bool:
    return any(re.fullmatch(pattern, value) for value in values)


def faults(expression: str, families) -> list[str]:
    """Return what an expression asks for that the server does not have, or that makes no sense."""
    tree = promql.parse(expression)
    known = vocabulary(families)
    found: list[str] = []
    usable = set(TARGET)
    for selector in selectors(tree):
        if selector.name not in known:
            found.append(f"there is no {selector.name}")
            continue
        kind, labels, values = known[selector.name]
        usable |= labels
        counts = kind == "counter" or (kind == "histogram" and selector.name.endswith(("_bucket", "_sum", "_count")))
        if (selector.function in COUNTING) != counts and selector.name not in AT_THE_START:
            found.append(f"{selector.function or 'no function'} of the {kind} {selector.name}")
        for label, value in selector.matchers:
            if label not in labels | TARGET:
                found.append(f"{selector.name} has no label {label}")
            elif label in labels:
                patterns = value.split("|")
                found += [f"{label} is never {each}" for each in patterns if not _matches(each, values[label])]
    found += [f"nothing has the label {label}" for label in groupings(tree) if label not in usable]
    return found
