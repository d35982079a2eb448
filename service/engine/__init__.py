"""Engines: what runs an expert. One protocol, and vLLM, remote and simulated behind it."""
