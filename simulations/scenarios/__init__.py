"""Scenarios of a simulation: drop-outs, networks, malicious sites, and a curious coordinator."""
