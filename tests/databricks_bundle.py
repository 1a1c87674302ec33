"""The bundle of conf/databricks as the Databricks CLI reads it: files included, references of a target resolved."""

import re
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parents[1] / "conf"
BUNDLE = CONF / "databricks"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")

# What a person has to say, and what the CLI asks the workspace for.
GIVEN = {"catalog": "main", "warehouse_id": "w1", "curators": "curators", "notify": "ann@lab.org"}
WORKSPACE = {"current_user": {"userName": "ann@lab.org", "short_name": "ann"}}


def read() -> dict[str, Any]:
    """Read databricks.yml and the files that it includes, as they are written."""
    bundle = yaml.safe_load((BUNDLE / "databricks.yml").read_text(encoding="utf-8"))
    bundle["resources"] = {}
    for pattern in bundle["include"]:
        for path in sorted(BUNDLE.glob(pattern)):
            for kind, found in yaml.safe_load(path.read_text(encoding="utf-8"))["resources"].items():
                known = bundle["resources"].setdefault(kind, {})
                assert not known.keys() & found.keys(), f"{path.name}: {kind} {found.keys()} twice"
                known.update(found)
    return bundle


def resolved(target: str, **given: Any) -> dict[str, Any]:
    """Return the resources of a target with every reference replaced; KeyError names one that leads nowhere."""
    bundle = read()
    declared = bundle["variables"]
    values = {name: variable["default"] for name, variable in declared.items() if "default" in variable}
    values |= bundle["targets"][target].get("variables", {}) | GIVEN
    values |= {"principal": "app-id"} if target == "prod" else {}
    assert given.keys() <= declared.keys()
    context = {
        "var": values | given,
        "resources": bundle["resources"],
        "bundle": {"name": bundle["bundle"]["name"], "target": target},
        "workspace": WORKSPACE,
    }
    return _replaced(bundle["resources"], context)


def _replaced(node: Any, context: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, context) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, context) for value in node]
    if not isinstance(node, str):
        return node
    if whole := REFERENCE.fullmatch(node):
        return _replaced(_looked_up(whole[1], context), context)
    return REFERENCE.sub(lambda found: str(_replaced(_looked_up(found[1], context), context)), node)


def _looked_up(path: str, context: dict[str, Any]) -> Any:
    node: Any = context
    for name in path.split("."):
        if name not in node:
            raise KeyError(f"${{{path}}}")
        node = node[name]
    return node


def task_words(job: dict[str, Any], task: dict[str, Any], **parameters: str) -> list[str]:
    """Return a wheel task's words, job parameters filled in as Workflows does: a run's own, else the defaults."""
    values = {one["name"]: one["default"] for one in job.get("parameters", [])}
    assert parameters.keys() <= values.keys()
    values |= parameters
    spelt = re.compile(r"\{\{job\.parameters\.(\w+)\}\}")
    return [spelt.sub(lambda found: values[found[1]], word) for word in task["python_wheel_task"]["parameters"]]


def in_order(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a job's tasks, each after those that it depends on."""
    waiting, done = list(job["tasks"]), []
    while waiting:
        names = {task["task_key"] for task in done}
        ready = [t for t in waiting if {d["task_key"] for d in t.get("depends_on", [])} <= names]
        assert ready, f"tasks wait for each other, or for none of the job: {[t['task_key'] for t in waiting]}"
        done.append(ready[0])
        waiting.remove(ready[0])
    return done
