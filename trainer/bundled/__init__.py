"""How everything in `prefix_store/bundled` is made: the demonstration model and the text of its prefixes."""
