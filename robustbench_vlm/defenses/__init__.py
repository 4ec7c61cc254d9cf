"""Defenses: subclasses of `interface.Defense`, one file each, named as it is typed."""
