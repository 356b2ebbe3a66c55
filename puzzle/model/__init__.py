"""The heterogeneous decoder: architecture as data, module, checkpoint format."""
