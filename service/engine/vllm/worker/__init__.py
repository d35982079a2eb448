"""Extensions of vLLM's worker, and their parts. They run in the engine core's process."""
