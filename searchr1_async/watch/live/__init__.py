"""The live view of a run in a notebook: its words, its page, its pictures."""
