"""A report for people: in a notebook's cell, as text, Markdown, LaTeX, and as one page."""
