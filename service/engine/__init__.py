"""Engines: vLLM, remote endpoints and a simulated one."""
