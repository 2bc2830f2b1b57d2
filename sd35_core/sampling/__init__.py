"""Schedules, samplers, guidance, and the settings that each model was made for."""
