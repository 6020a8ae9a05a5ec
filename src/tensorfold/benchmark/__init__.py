"""Speed and memory of folded models, beside what they could be instead."""
