"""HTTP endpoints of the gateway, a module each."""
