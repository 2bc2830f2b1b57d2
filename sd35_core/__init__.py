"""SD3.5 in plain torch, with no host.

network       MMDiT-X and its ControlNets: tensors in, tensors out
encoders      text, pictures and hints on their way into it and out
sampling      schedules, samplers, guidance, and each model's settings
checkpoint    files of models, and networks from them
packing       weights in 8 to 2 bits; quantization makes models of them
training      small models from pictures with captions
workflow      what a ComfyUI workflow will do wrong, read and said
pipeline      all of it: from a prompt to a picture
"""
