"""The coordinator's ports: connections are accepted and counted here, before TLS."""
