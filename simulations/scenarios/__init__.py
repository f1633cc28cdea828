"""What happens to simulated sites: drop-outs, networks, malicious sites, a curious coordinator."""
