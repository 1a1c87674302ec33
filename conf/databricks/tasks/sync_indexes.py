"""Bring vector search indexes to the state of their tables: sync_indexes.py INDEX... (a task of the bundle)."""

import sys
import time

from databricks.sdk import WorkspaceClient

POLL_SECONDS = 30  # until a new index has taken in its table


def sync(workspace: WorkspaceClient, index: str, poll_seconds: float = POLL_SECONDS) -> None:
    """Start a sync of an index, once it is ready."""
    while True:
        status = workspace.vector_search_indexes.get_index(index).status
        if status and status.ready:
            break
        print(f"{index} is not ready yet: {status.message if status else 'no status'}", flush=True)
        time.sleep(poll_seconds)
    workspace.vector_search_indexes.sync_index(index)
    print(f"{index}: {status.indexed_row_count or 0:,} rows before this sync, which goes on by itself", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sync(WorkspaceClient(), name)
