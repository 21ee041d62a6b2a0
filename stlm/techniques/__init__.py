"""Techniques, one file each: what each adds to the model, its objective, its cost and its evaluation."""
