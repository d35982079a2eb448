"""OpenAI's Files and Batches API: files, the state of batches, their plan and their run."""
