"""Listening ports: who may hold a connection, how long, and how many files that takes."""
