"""Reinforcement learning: policies improved from interaction."""
