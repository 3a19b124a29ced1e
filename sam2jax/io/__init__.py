"""Files in and out: checkpoints, videos, images."""
