"""A scan of data files before training: direct identifiers, near-duplicates, label noise, empty and templated texts."""
