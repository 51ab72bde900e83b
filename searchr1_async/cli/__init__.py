"""The console script ``searchr1``, also ``python -m searchr1_async``."""
