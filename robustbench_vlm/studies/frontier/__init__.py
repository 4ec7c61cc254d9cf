"""Frontier studies: methods ranked by what clean accuracy costs them in robust accuracy."""
