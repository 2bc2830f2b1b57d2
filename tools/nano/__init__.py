"""Everything that made models/nano: the pictures, the scenes, the training, the export."""
