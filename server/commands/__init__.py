"""The commands of a coordinator."""
