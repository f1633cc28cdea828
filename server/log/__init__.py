"""Write, witness and serve the round log."""
