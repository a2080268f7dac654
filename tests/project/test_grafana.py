"""The dashboard and the alerts: every metric there exists, and Prometheus' own promtool loads and fires the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from builder.report import metrics

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "grafana"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
DAY = 24 * 60


def rules() -> list[dict[str, Any]]:
    (group,) = YAML(typ="safe").load(FOLDER / "alerts.yaml")["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def queries() -> list[str]:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_metric_of_dashboard_and_alerts_exists() -> None:
    used = re.findall(r"warm_cache_\w+", "\n".join([*queries(), *(rule["expr"] for rule in rules())]))
    assert set(used) <= metrics.names()
    assert len(set(used)) > 25
    readme = (FOLDER / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)`", readme, re.MULTILINE) == [rule["alert"] for rule in rules()]


def promtool(*arguments: str, cwd: Path) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    records = [
        {"record": f"q{at}", "expr": query.replace("$instance", "x")}
        for at, query in enumerate(dict.fromkeys(queries()))
    ]
    (tmp_path / "queries.yaml").write_text(json.dumps({"groups": [{"name": "q", "rules": records}]}))
    assert f"{len(records)} rules found" in promtool("check", "rules", "queries.yaml", cwd=tmp_path)


#: alert → a metric with values at which it is silent, and at which it fires, after three days.
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "WarmCacheCompiledInJobs": ({"jobs_compiled_seconds": "59x200"}, {"jobs_compiled_seconds": "61x200"}),
    "WarmCacheBehindRegistry": (
        {"image_behind_since_timestamp_seconds": "0x200", "pull_behind_since_timestamp_seconds": "181440x200"},
        {"image_behind_since_timestamp_seconds": "0x200", "pull_behind_since_timestamp_seconds": "164160x200"},
    ),
    "WarmCacheNoGoodRefresh": (
        {"refresh_last_success_timestamp_seconds": f"{37 * 3600}x200"},
        {"refresh_last_success_timestamp_seconds": f"{35 * 3600}x200"},
    ),
    "WarmCacheSignatureRefused": (
        {"pull_signature_refusals_total": "2x200"},
        {"pull_signature_refusals_total": "0x142 1x50"},
    ),
    "WarmCachePruneBlocked": (
        {"refresh_prune_blocked_seconds": "172799x200"},
        {"refresh_prune_blocked_seconds": "172801x200"},
    ),
    "WarmCacheNearlyFull": (
        {"size_bytes": "89x200", "limit_bytes": "100x200", "filesystem_free_bytes": "11x200",
         "filesystem_size_bytes": "100x200"},
        {"filesystem_free_bytes": "9x200", "filesystem_size_bytes": "100x200"},
    ),
    "WarmCacheMetricsStale": (
        {"refresh_last_run_timestamp_seconds": f"{43 * 3600}x200"},
        {"refresh_last_run_timestamp_seconds": f"{41 * 3600}x200"},
    ),
}  # fmt: skip


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)
    assert SERIES.keys() == {rule["alert"] for rule in rules()}
    names = {metric.name: metric for metric in metrics.TABLE}
    tests = []
    for alert, (silent, firing) in SERIES.items():
        for series in (silent, firing):
            expressions = [
                {
                    "series": f'{metrics.PREFIX}{names[name].name}{{instance="i"}}',
                    "values": f"{each.replace('x', '+0x')}",
                }
                for name, each in series.items()
            ]
            fires = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
            expected = [{"labels": "{}", "value": int(series is firing)}]
            check = {"expr": fires, "eval_time": f"{3 * DAY}m", "exp_samples": expected}
            tests.append({"interval": "30m", "input_series": expressions, "promql_expr_test": [check]})
    (tmp_path / "tests.yaml").write_text(
        json.dumps({"rule_files": ["alerts.yaml"], "evaluation_interval": "30m", "tests": tests})
    )
    promtool("check", "rules", "alerts.yaml", cwd=tmp_path)
    promtool("test", "rules", "tests.yaml", cwd=tmp_path)
