"""What the coordinator and the sites share: the study, the adapter, privacy accounting and the wire format."""
