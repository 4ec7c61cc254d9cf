"""Training: resolve a recipe, prepare its models and data, take steps, save and resume, estimate the cost."""
