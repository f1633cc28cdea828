"""Simulate a study, compare runs with each other and with baselines, and sweep over the fields of a study."""
