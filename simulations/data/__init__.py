"""The records of simulated sites: made up, read from files, or dealt out from a pool."""
