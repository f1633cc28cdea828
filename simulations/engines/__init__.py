"""Engines that run simulated sites: in one process, in several, or with Ray."""
