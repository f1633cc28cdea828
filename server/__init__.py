"""The coordinator: rounds, aggregation, state and the released adapter."""
