"""FFN Fusion (arXiv 2503.18908): block dependency, grouping, weight fusion and its verification."""
