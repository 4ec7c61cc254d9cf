"""Who attacks: the native engine, its reference mode, or an installed attack package."""
