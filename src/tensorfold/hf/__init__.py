"""How transformers builds, loads, ties and saves models: swapping, the quantizer hooks, checkpoints, sources."""
