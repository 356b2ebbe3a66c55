"""The Puzzle search: block library, scores, costs, search, assembly."""
