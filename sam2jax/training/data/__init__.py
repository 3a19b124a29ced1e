"""Training data: sources of clips, augmentation, and a loader that shuffles and resumes."""
