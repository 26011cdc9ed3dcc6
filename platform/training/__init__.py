"""Training: the loop, DeepSpeed under it, checkpoints beside it, and Ray Train around it."""
