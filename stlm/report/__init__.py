"""Tables, plots and metrics of a study, made from what its runs left behind."""
