"""Reads params/ into typed, validated studies and runs; nothing else reads params/."""
