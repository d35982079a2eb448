"""Demo experts: LoRA adapters on one small base, how they are trained and measured."""
