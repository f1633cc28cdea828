"""A study file made from data files: what they hold, the sites that they belong to, and values that fit their size."""
