"""The guard: prompt injection and personal data."""
