"""Where passages are stored with their vectors, and the sources that an index is built from."""
