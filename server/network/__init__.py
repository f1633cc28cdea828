"""The coordinator's network service: the gate, and Flower behind it."""
