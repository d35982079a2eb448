"""Engines by command: servers of somebody else's, each a process that we start, ask and stop."""
