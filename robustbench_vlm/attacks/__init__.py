"""The list of attacks, one file or folder each; `engine.interface.Attack` says what an attack is."""
