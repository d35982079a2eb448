"""Several Ray nodes on one machine: killed, cut off, and behind a slow link."""
