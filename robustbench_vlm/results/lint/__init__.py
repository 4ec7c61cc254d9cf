"""Somebody's table of results, read, traced to its sources, and judged: which cells may not be compared.

`table` and `latex` read, `names` understands labels, `records` and `settings` are what is known about
printed numbers, `matching` finds the source of each cell, `judging` compares cells, `report` is the whole.
"""
