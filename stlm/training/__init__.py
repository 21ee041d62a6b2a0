"""The training loop, optimizer, schedule, checkpoints and devices."""
