"""Choosing the settings of a study before any record is read: a planner that simulates a small stand-in for it."""
