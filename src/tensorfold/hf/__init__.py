"""Everything that knows how transformers builds, loads, ties and saves models; nothing outside this folder does."""
