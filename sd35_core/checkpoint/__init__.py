"""Files of models, and networks from them."""
