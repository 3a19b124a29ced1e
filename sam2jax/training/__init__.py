"""Training and fine-tuning (SAM 2 paper, appendix D; official `training/`)."""
