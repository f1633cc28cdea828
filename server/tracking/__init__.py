"""A released run for the tracking tools that people have: what may be handed on, and how each tool takes it."""
