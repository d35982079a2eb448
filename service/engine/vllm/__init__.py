"""The vLLM engine, and in-place swaps of its weights. All access to vLLM is in here."""
