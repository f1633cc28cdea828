"""Attacks on studies and their runs: what could be learnt, measured beside an arm without protection."""
