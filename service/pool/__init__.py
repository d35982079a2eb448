"""A pool: its queue, its planner and its slots."""
