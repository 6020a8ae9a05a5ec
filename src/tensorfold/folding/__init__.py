"""From a plan to a folded model, in memory or from disk to disk."""
