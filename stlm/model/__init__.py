"""The transformer and its interchangeable parts. Knows nothing of files."""
