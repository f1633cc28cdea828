"""Simulate a study, compare it with its baselines, and sweep over its fields."""
