"""The round log: Merkle tree, signed checkpoints, tiles, and the statements that are its leaves."""
