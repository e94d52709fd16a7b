"""Prometheus' files: what they name exists, what they say parses, and alerts fire on what they are for."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

import pytest
import yaml
from dockerfile import ROOT
from promql import faults

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "fastdist.rules.yml"
CASES = sorted((ROOT / "tests" / "deploy").glob("alerts*.test.yml"))
OPERATIONS = ROOT / "docs" / "operations.md"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
NAMES = [alert["alert"] for alert in ALERTS]
BASE_UNITS = {
    "seconds",
    "bytes",
    "packets",
    "share",
    "info",
    "up",
    "draining",
    "probation",
    "ready",
    "connections",
    "connected",
    "current",
    "total",
    "successful",
    "problems",
}
OTHER_UNITS = re.compile(r"_(ms|milliseconds|us|ns|minutes|hours|kb|mb|kib|mib|percent|kilobytes|megabytes)(_|$)")


# -------------------------------------------------------------------------------------------------------- the metrics


def test_metrics_follow_naming_conventions(all_families):
    assert all_families
    for family in all_families:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert re.fullmatch(r"fastdist_[a-z][a-z0-9_]*", name)
        assert name.rsplit("_", 1)[1] in BASE_UNITS or name.endswith("_dead_letters"), name
        assert not OTHER_UNITS.search(name)
        assert (family.type == "counter") == name.endswith("_total")
        assert family.type in {"counter", "gauge", "histogram"}
        if family.type == "histogram":
            assert name.endswith("_seconds")
        for sample in family.samples:
            assert set(sample.labels) <= {
                "analyzer",
                "certificate",
                "reason",
                "protocol",
                "code",
                "worker",
                "le",
                "version",
                "python",
            }
            assert not name.endswith("_share") or 0 <= sample.value <= 1


def test_metrics_have_unique_help_texts(all_families):
    told = {family.name: family.documentation for family in all_families}
    assert all(re.fullmatch(r"[A-Z].{10,}\.", text) for text in told.values())
    assert max(Counter(told.values()).values()) == 1


def test_promtool_accepts_the_metrics(promtool, exposition):
    done = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------- the alerts


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_an_alert_asks_for_what_there_is(alert, all_families):
    assert faults(alert["expr"], all_families) == []


def test_what_alerts_must_not_use_is_found(families):
    assert faults("rate(fastdist_packets_accepted[5m])", families) == ["there is no fastdist_packets_accepted"]
    assert faults("rate(fastdist_queue_packets[5m])", families) == ["rate of the gauge fastdist_queue_packets"]
    assert faults("fastdist_packets_accepted_total", families) == [
        "no function of the counter fastdist_packets_accepted_total"
    ]
    wrong = 'sum by (emitter) (rate(fastdist_packets_rejected_total{reason="full|queue_full", analyzer="A1"}[5m]))'
    assert faults(wrong, families) == [
        "reason is never full",
        "fastdist_packets_rejected_total has no label analyzer",
        "nothing has the label emitter",
    ]
    with pytest.raises(ValueError, match="parenthesis"):
        faults("sum(rate(fastdist_packets_accepted_total[5m])", families)


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_alert_has_severity_summary_action(alert):
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Fastdist([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"
    whose = "job" if re.match(r"(max|min|sum) by \(job\)", alert["expr"]) else "instance"
    assert f"$labels.{whose} " in alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")


def test_no_two_alerts_have_the_same_name():
    assert len(set(NAMES)) == len(NAMES)


def test_alerts_and_documentation_agree():
    text = OPERATIONS.read_text()
    headings = re.findall(r"^### (Fastdist\w+)$", text, re.MULTILINE)
    assert headings == NAMES
    sections = re.findall(r"^### Fastdist\w+$(.*?)(?=^##)", text + "\n##", re.MULTILINE | re.DOTALL)
    for name, section in zip(headings, sections, strict=True):
        assert re.search(r"^\*Means:\* .*^\*Do:\* ", section, re.MULTILINE | re.DOTALL), name


def test_each_alert_is_tested_both_ways():
    tests = [test for file in CASES for test in yaml.safe_load(file.read_text())["tests"]]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(NAMES)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(NAMES)


def test_alerts_fire_on_what_they_are_for(promtool):
    done = subprocess.run([promtool, "test", "rules", *map(str, CASES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_config_and_rules(promtool):
    for words in (["config", str(PROMETHEUS / "prometheus.yml")], ["rules", "--lint-fatal", str(RULES)]):
        done = subprocess.run([promtool, "check", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout


# --------------------------------------------------------------------------------------------------- the configuration


def test_config_reads_rules_and_scrapes_job():
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert configuration["rule_files"] == [RULES.name]
    (job,) = configuration["scrape_configs"]
    used = set(re.findall(r'job="(\w+)"', RULES.read_text()))
    assert used == {job["job_name"]}
    interval = int(configuration["global"]["scrape_interval"].removesuffix("s"))
    windows = {int(minutes) for minutes in re.findall(r"\[(\d+)m\]", RULES.read_text())}
    assert min(windows) * 60 >= 4 * interval  # a rate over fewer samples comes and goes
