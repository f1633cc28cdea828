"""A study and its rounds: consent, collection, aggregation, state, and release."""
