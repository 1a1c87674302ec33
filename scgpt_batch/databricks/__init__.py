"""Databricks workspaces: serving endpoints, status, and the bundle's dashboard and alerts."""
