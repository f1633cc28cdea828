"""Inject faults into a deployed consortium, and check the invariants after each."""
