"""What the product does on a GPU, by one command in a quarter of an hour."""
