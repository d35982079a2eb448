"""Ray Serve deployments of gateway and pools."""
