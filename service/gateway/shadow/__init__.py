"""Shadow evaluation: asks other experts what one has answered, and records which did better."""
