"""Contrastive learning with non-semantic negatives: the modules behind the scripts."""
