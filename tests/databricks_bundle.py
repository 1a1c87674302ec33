"""The bundle of conf/databricks as the Databricks CLI reads it: files included, references of a target resolved."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

CONF = Path(__file__).parents[1] / "conf"
BUNDLE = CONF / "databricks"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")

# What a person has to say, and what the CLI asks the workspace for.
GIVEN = {
    "catalog": "main", "warehouse_id": "w1", "curators": "curators", "readers": "readers", "notify": "ann@lab.org",
}  # fmt: skip
WORKSPACE = {"current_user": {"userName": "ann@lab.org", "short_name": "ann"}}


OPTIONAL = "search.yml"  # databricks.yml includes it once somebody takes away the comment sign


def read() -> dict[str, Any]:
    """Read databricks.yml and the files that it includes, and the optional one, as they are written."""
    bundle = yaml.safe_load((BUNDLE / "databricks.yml").read_text(encoding="utf-8"))
    bundle["resources"] = {}
    for pattern in [*bundle["include"], OPTIONAL]:
        for path in sorted(BUNDLE.glob(pattern)):
            for kind, found in yaml.safe_load(path.read_text(encoding="utf-8"))["resources"].items():
                known = bundle["resources"].setdefault(kind, {})
                assert not known.keys() & found.keys(), f"{path.name}: {kind} {found.keys()} twice"
                known.update(found)
    return bundle


def resolved(target: str, *, override: Mapping[str, Any] = MappingProxyType({}), **given: Any) -> dict[str, Any]:
    """Return the resources of a target with every reference replaced; KeyError names one that leads nowhere.

    `override` is merged into the target, as somebody would write it there.
    """
    bundle = read()
    bundle["targets"][target] = merged(bundle["targets"][target], override)
    resources = merged(bundle["resources"], bundle["targets"][target].get("resources", {}))
    declared = bundle["variables"]
    values = {name: variable["default"] for name, variable in declared.items() if "default" in variable}
    values |= bundle["targets"][target].get("variables", {}) | GIVEN
    values |= {"principal": "app-id", "deployer": "deployer-id"} if target == "prod" else {}
    assert given.keys() <= declared.keys()
    context = {
        "var": values | given,
        "resources": resources,
        "bundle": {"name": bundle["bundle"]["name"], "target": target},
        "workspace": WORKSPACE,
    }
    return _replaced(resources, context)


KEYS = {"job_clusters": "job_cluster_key", "tasks": "task_key", "parameters": "name"}


def merged(one: Any, other: Any, name: str = "") -> Any:
    """Merge a target's settings over others as the CLI does: maps by key, named lists by name, other lists appended."""
    if isinstance(one, dict) and isinstance(other, Mapping):
        both = {key: merged(one[key], other[key], key) for key in one.keys() & other.keys()}
        return {**one, **other, **both}
    if isinstance(one, list) and isinstance(other, list):
        key = KEYS.get(name)
        if key is None or not all(isinstance(each, dict) for each in one):
            return [*one, *other]
        return list(merged({each[key]: each for each in one}, {each[key]: each for each in other}).values())
    return other


# A change of these makes the CLI delete the resource and create it again.
IDENTITY = {
    "schemas": ("catalog_name",), "volumes": ("catalog_name", "schema_name", "volume_type"),
    "registered_models": ("catalog_name", "schema_name", "name"), "model_serving_endpoints": ("name",),
    "experiments": ("artifact_location",), "alerts": ("parent_path",),
    "vector_search_endpoints": ("name", "endpoint_type"),
    "vector_search_indexes": ("name", "endpoint_name", "primary_key", "index_type", "delta_sync_index_spec"),
}  # fmt: skip


def plan(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what a deploy changes: `create`, `update` (with the fields), `recreate` or `delete` and the resource."""
    steps = []
    for kind in sorted(before.keys() | after.keys()):
        old, new = before.get(kind, {}), after.get(kind, {})
        steps += [f"delete {kind}.{key}" for key in sorted(old.keys() - new.keys())]
        steps += [f"create {kind}.{key}" for key in sorted(new.keys() - old.keys())]
        for key in sorted(old.keys() & new.keys()):
            changed = sorted(f for f in old[key].keys() | new[key].keys() if old[key].get(f) != new[key].get(f))
            verb = "recreate" if set(changed) & set(IDENTITY.get(kind, ())) else "update"
            steps += [f"{verb} {kind}.{key}: {', '.join(changed)}"] if changed else []
    return steps


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


def documented_variants() -> dict[str, dict[str, Any]]:
    """Return the YAML blocks of the document's section "Variants", each by the sentence before it."""
    text = (CONF.parent / "docs" / "databricks.md").read_text(encoding="utf-8")
    section = re.search(r"^## Variants$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    blocks = re.finditer(r"^```yaml\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return {section[1][: b.start()].rstrip().rsplit("\n\n", 1)[-1]: yaml.safe_load(b[1]) for b in blocks}
