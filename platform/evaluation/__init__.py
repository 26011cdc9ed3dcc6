"""Evaluation: how good, where the model thought, and what that cost."""
