"""From params/ to typed, validated studies and runs: the only reader of params/."""
