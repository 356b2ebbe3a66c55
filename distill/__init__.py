"""Training substrate: data, losses, engines and the trainer. Knows nothing of Puzzle."""
