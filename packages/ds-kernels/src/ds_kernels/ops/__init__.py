"""One module per family of ops: schema, reference in torch, checks and the functions people call."""
