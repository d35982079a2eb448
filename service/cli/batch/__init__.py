"""`coe batch`: plans, submits, watches and fetches batches of requests."""
