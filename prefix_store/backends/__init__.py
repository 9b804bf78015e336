"""Where records and blobs are kept."""
