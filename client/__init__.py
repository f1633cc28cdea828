"""A site: its data, its model, local training under differential privacy."""
