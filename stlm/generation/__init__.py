"""Text generation: sampling, the key/value cache, and one interface for models of all kinds."""
