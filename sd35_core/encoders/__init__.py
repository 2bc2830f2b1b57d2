"""What goes into the network and comes out of it: text, pictures, hints."""
