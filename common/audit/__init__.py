"""Verify a log and a bundle offline, and write the privacy statement and the signature of a release."""
