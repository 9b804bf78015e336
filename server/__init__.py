"""HTTP -> scheduler -> engine: mixed-prefix generation over one frozen model."""
