"""Checks before a version becomes champion."""
