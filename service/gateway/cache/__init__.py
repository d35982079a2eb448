"""The response cache: identical requests, and similar questions."""
