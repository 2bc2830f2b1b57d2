"""ComfyUI from a script: one workflow, or many."""
