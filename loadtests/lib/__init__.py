"""What several load tests share."""
