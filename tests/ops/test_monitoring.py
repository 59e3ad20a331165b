"""Prometheus' rules, Grafana's dashboard and what Compose makes of them: they name what there is, all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gpu_worker.metrics import METRICS
from jobqueue.job import JobKind

ROOT = Path(__file__).parents[2]
SUFFIXES = ("_bucket", "_sum", "_count")
NAMES = {metric.name: metric for metric in METRICS}


def loaded(file: str) -> Any:
    return yaml.safe_load((ROOT / file).read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in loaded("ops/alerts.yml")["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "ops" / "grafana.json").read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel.get("targets", ()))
    yield from (trigger["metadata"]["query"] for trigger in loaded("ops/keda.yaml")["spec"]["triggers"])


def metric_of(series: str) -> str:
    """A histogram has several series."""
    base = next((series.removesuffix(end) for end in SUFFIXES if series.endswith(end)), series)
    return base if base in NAMES and NAMES[base].kind == "histogram" else series


def test_the_dashboard_and_the_alerts_name_every_metric_and_no_other() -> None:
    named = {metric_of(series) for text in expressions() for series in re.findall(r"loraq_\w+", text)}

    assert named == NAMES.keys()


def test_what_they_group_and_choose_by_are_labels_of_the_metric() -> None:
    for text in expressions():
        known = {"le", "instance", "job"}
        for series in re.findall(r"loraq_\w+", text):
            known |= set(NAMES[metric_of(series)].labels)
        lists = re.findall(r"(?:by|without) \(([^)]*)\)", text)
        chosen = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\"", text)
        used = {label.strip() for labels in lists for label in labels.split(",")} | set(chosen)
        assert used <= known, text


def test_counters_are_asked_for_their_increase_and_taken_once_from_several_workers() -> None:
    for text in expressions():
        for series in re.findall(r"loraq_\w+", text):
            if NAMES[metric_of(series)].kind != "gauge":
                assert re.search(rf"(?:rate|increase)\({series}", text), text
        assert not re.search(r"sum(?: by \([^)]*\))? \(?(?:rate|increase|loraq)", text), (
            f"it adds what workers repeat: {text}"
        )


def test_each_alert_says_what_to_do_about_it() -> None:
    names = [rule["alert"] for rule in rules()]

    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)


def test_prometheus_scrapes_where_compose_serves_and_finds_its_rules() -> None:
    config, services = loaded("ops/prometheus.yml"), loaded("compose.yaml")["services"]
    [job] = config["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    mounted = [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]

    assert services[host]["environment"]["LORAQ_METRICS_PORT"] == int(port)
    assert "ports" not in services[host], "nobody else is to read them"
    assert [f"/etc/prometheus/{file}" for file in config["rule_files"]] == ["/etc/prometheus/alerts.yml"]
    assert {"/etc/prometheus/prometheus.yml", "/etc/prometheus/alerts.yml"} < set(mounted)


def test_grafana_is_provisioned_with_what_is_mounted_and_is_not_open_to_the_network() -> None:
    compose = loaded("compose.yaml")
    grafana, configs = compose["services"]["grafana"], compose["configs"]
    contents = {name: yaml.safe_load(config["content"]) for name, config in configs.items()}
    [provider] = contents["grafana-dashboards"]["providers"]
    [source] = contents["grafana-datasource"]["datasources"]
    [mounted] = grafana["volumes"]

    assert {config["source"] for config in grafana["configs"]} == configs.keys()
    assert mounted.split(":")[1] == f"{provider['options']['path']}/grafana.json"
    assert source["url"] == "http://prometheus:9090"
    assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])
    assert {name for name, service in compose["services"].items() if "profiles" in service} == {"prometheus", "grafana"}


def test_pods_are_made_by_the_jobs_that_need_a_gpu_and_go_one_by_one() -> None:
    spec = loaded("ops/keda.yaml")["spec"]
    (trigger,) = spec["triggers"]
    deployments = {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]
        for document in yaml.safe_load_all((ROOT / "ops" / "kubernetes.yaml").read_text())
    }

    left_out = re.search(r'kind!~"([^"]*)"', trigger["metadata"]["query"])
    assert left_out
    assert set(left_out[1].split("|")) == {kind for kind in JobKind if kind.control}
    pod = deployments[spec["scaleTargetRef"]["name"]]
    (policy,) = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["policies"]
    assert (policy["type"], policy["value"]) == ("Pods", 1)
    assert policy["periodSeconds"] > pod["terminationGracePeriodSeconds"], "one is gone before the next is chosen"
    (control,) = deployments["loraq-control"]["containers"]
    environment = {each["name"]: each.get("value") for each in control["env"]}
    assert environment["LORAQ_METRICS_PORT"] == str(control["ports"][0]["containerPort"])
