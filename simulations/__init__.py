"""Many sites in one process: synthetic data, baselines, reports."""
