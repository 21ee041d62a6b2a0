"""What a teacher says about the text that a run will train on, computed once and kept."""
