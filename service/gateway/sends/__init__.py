"""ASGI sends that the gateway puts around the server's own."""
