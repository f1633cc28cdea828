"""What is agreed and what is said: the study file, the layout of the adapter, and the messages."""
