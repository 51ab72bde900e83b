"""Question suites and corpora: built in, from files, and from the Hugging Face hub."""
