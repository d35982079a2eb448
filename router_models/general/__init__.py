"""The general router: everyday categories, and the prompts that teach them."""
