"""The live notebook view of a run: text, page and pictures."""
