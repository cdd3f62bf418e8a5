"""Data sets, augmentation recipes and the loaders that feed the training loop."""
