"""Many servers behind one address, by Ray Serve: an optional extra, imported only by `antefix serve --ray`."""
