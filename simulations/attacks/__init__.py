"""Attacks on studies and their runs, each compared with a baseline without protection."""
