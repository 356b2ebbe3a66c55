"""Command line, configuration, artifacts, pipeline and report."""
