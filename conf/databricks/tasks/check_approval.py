"""Fail unless a model version is approved: check_approval.py MODEL VERSION TAG (a task of the deployment job).

The button "Approve" on the version's page sets the tag, whose name is that of the task, and repeats the task.
"""

import sys

from mlflow import MlflowClient

APPROVED = "approved"


def check(model: str, version: str, tag: str) -> None:
    """Return if the version's tag says that it is approved; exit with a message otherwise."""
    found = MlflowClient(registry_uri="databricks-uc").get_model_version(model, version).tags.get(tag)
    if found is None or found.lower() != APPROVED:
        sys.exit(
            f"version {version} of {model} is not approved: its tag {tag!r} is {found or 'not set'}. If the task "
            "before this one is as you want it, press Approve on the version's page; the job then goes on"
        )
    print(f"version {version} of {model} is approved")


if __name__ == "__main__":
    check(*sys.argv[1:])
