"""Segmenting images: pure functions on features and prompts."""
