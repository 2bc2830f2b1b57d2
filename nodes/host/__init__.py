"""Everything that touches ComfyUI: only this package imports `comfy` and `folder_paths`."""
