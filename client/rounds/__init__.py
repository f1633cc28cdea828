"""A site's part in a round: the worker and what it answers, masked and logged."""
