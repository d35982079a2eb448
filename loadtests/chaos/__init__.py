"""Load tests with failures injected."""
