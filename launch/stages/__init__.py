"""Stage bodies: thin functions from typed configuration and input artifacts to an output directory."""
