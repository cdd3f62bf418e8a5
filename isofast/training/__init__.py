"""Training: the loop, its step, optimizers, parallelism and evaluation beside it."""
