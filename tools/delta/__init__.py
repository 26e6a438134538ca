"""How much of a model's FP8 form an optimiser step changes."""
