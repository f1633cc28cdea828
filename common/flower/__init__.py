"""Messages as Flower's records and objects."""
