"""What a ComfyUI workflow will do wrong, read and said: `python -m sd35_core.workflow`."""
