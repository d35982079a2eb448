"""The classifier: from a prompt to category scores and expected quality."""
