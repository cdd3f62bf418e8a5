"""Training: the loop, the step, optimizers, data parallelism and online evaluation."""
