"""Renders a report: notebook cell, text, Markdown, LaTeX and HTML page."""
