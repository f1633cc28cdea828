"""The coordinator's port, and Flower behind it."""
