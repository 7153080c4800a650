"""From files and names to objects: configuration, plug-ins, the DeepSpeed vocabulary."""
