"""Run simulated sites: in one process, in several, or through Ray."""
