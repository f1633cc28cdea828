"""A site's part in a round: the worker and its answers, masked and logged."""
