"""isofast: non-contrastive self-supervised learning at the speed of the hardware."""
