"""The built-in tiny world: its weights and the demonstration."""
