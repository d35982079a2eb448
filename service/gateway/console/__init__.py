"""The web console: pages and their event stream."""
