"""Greedy generation with static shapes: two compiled programs, whatever the prompts."""
