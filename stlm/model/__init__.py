"""The transformer and its interchangeable parts. Reads and writes no files."""
