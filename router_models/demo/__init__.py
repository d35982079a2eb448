"""The demo router: its prompts and how it is fitted."""
