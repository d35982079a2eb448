"""Ollama's API as a thin face over the endpoints that carry a prompt. Pure."""
