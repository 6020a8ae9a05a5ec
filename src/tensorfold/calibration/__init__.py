"""Activations and gradients in, second moments out."""
