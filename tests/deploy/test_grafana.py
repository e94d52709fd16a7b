"""Grafana's dashboard: every panel asks for what there is, says what it shows, and has a place of its own."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml
from dockerfile import ROOT
from promql import TARGET, faults, vocabulary

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "fastdist.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
UNITS = {"short", "percentunit", "s", "reqps", "cps", "Bps", "bytes"}
NOT_DRAWN = {
    "fastdist_analyzer_actual_share",  # since the start; the panel shows the last minutes
    "fastdist_packets_received_total",  # accepted and rejected are drawn apart
}


def plain(expression):
    """Return an expression as Prometheus gets it from Grafana."""
    return expression.replace("$__rate_interval", "5m").replace("$instance", ".*")


EXPRESSIONS = [plain(target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_there_is(panel, all_families):
    known = vocabulary(all_families)
    labels = TARGET.union(*(labels for _, labels, _ in known.values()))
    for target in panel["targets"]:
        assert faults(plain(target["expr"]), all_families) == []
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
        assert 'instance=~"$instance"' in target["expr"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_has_description_and_unit(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    assert [target["refId"] for target in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]


def test_every_metric_is_on_the_dashboard(all_families):
    drawn = set(re.findall(r"fastdist_\w+", " ".join(EXPRESSIONS)))
    for family in all_families:
        names = {sample.name for sample in family.samples}
        assert names & drawn or names <= NOT_DRAWN, family.name


def test_panels_share_no_id_title_position():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_all_panels_read_the_chosen_source():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    found = re.findall(r'"uid": "([^"]*)"', json.dumps([DASHBOARD["panels"], DASHBOARD["annotations"], variables]))
    assert set(found) == {"${datasource}"}


def test_queries_beside_the_panels_exist(families):
    known = vocabulary(families)
    for annotation in DASHBOARD["annotations"]["list"]:
        assert faults(plain(annotation["expr"]), families) == []
    queries = [each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    assert queries
    for query in queries:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        assert metric in known
        assert label in known[metric][1] | TARGET


def test_promtool_takes_every_expression(promtool, tmp_path):
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(EXPRESSIONS)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_provisioning_matches_its_mounts():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/fastdist.yaml").read_text())["providers"]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/fastdist.json"
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
