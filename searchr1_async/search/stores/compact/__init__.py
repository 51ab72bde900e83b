"""All of Wikipedia in a few gigabytes of memory: codes in memory, vectors and passages on disk."""
