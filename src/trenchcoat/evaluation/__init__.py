"""Scores, tasks, probes and the report."""
