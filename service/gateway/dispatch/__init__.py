"""Sending a request to pools or remote endpoints, with retries, and running recipes."""
