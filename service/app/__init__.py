"""The composition root: gateways and pools as a config says. Knows nothing of Ray."""
