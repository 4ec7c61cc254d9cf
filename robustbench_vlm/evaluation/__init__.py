"""Evaluate models on datasets: plan, cells, measurement, outcome."""
