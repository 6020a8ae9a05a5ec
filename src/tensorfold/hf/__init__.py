"""Everything that knows transformers' internals: swapping modules, quantizer hooks, ties, checkpoints, sources."""
