"""Perplexity, accuracy and samples of a model, by named protocols."""
