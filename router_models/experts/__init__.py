"""Training and evaluation of the demo experts, which are LoRA adapters on a small base."""
