"""Small models trained from pictures with captions: `python -m sd35_core.training`."""
