"""Routed experts that do not all fit into memory: their file, their slots, and who keeps one."""
