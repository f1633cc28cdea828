"""Inject faults into a deployed consortium, and check what must hold after each."""
