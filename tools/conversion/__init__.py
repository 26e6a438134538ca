"""How fast a checkpoint is converted, beside `cp` and another converter."""
