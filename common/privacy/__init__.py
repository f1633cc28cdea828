"""Differential privacy: accounting, noise, noise that sites share, and schedules."""
