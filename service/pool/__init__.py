"""One accelerator group or CPU slice: its queues, its slots, and what is in them."""
