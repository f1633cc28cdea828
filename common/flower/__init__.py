"""Messages as Flower records and objects."""
