"""One module per model family, each with its `FAMILY`; the registry finds them all."""
