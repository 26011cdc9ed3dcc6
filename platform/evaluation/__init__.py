"""Evaluation: loss, tasks, halting telemetry, and their cost."""
