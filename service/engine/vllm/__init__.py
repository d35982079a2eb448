"""The vLLM engine and in-place swapping of its weights."""
