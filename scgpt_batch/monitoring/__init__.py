"""Monitoring of the endpoint and the batch job: SQL queries, health rules, and an HTML page."""
