"""Verify a log and a bundle offline, and write the documents that a run leaves."""
