"""What sites agree on and exchange: the study file, the layout of the adapter, and the messages."""
