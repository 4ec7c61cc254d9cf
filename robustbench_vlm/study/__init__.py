"""Many training runs that answer one question: worked off, counted, tabulated and drawn."""
