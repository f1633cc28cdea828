"""A trained adapter in use: opened, applied to data, evaluated, exported and served."""
