"""Semi-supervised video object segmentation on benchmarks' folders, and its scores J and F."""
