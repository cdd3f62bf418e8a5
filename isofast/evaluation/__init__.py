"""What a finished or stopped run is worth, and its encoder for other programs."""
