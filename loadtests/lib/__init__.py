"""Shared parts of the load tests."""
