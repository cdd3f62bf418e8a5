"""Kernels of non-contrastive self-supervised learning."""
