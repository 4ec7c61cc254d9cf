"""Defenses: frozen dataclasses with `targets`, `inner` and `outer`; one file each. `registry` finds them."""
