"""Write, witness and read the round log."""
