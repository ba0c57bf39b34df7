"""How fast decoding is: of models, and of the attention ops alone."""
