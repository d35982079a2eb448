"""Finding candidates for a request and choosing among them."""
