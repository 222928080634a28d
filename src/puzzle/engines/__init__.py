"""Inference engines: how they are installed (`environments`), and which children they can run (`capability`)."""
