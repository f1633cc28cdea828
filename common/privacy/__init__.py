"""Differential privacy: accounting, noise, noise that sites share, and the learning-rate schedule."""
