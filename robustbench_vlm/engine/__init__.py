"""The scheduler that attacks share: rows, trajectories, verification, checks of the model."""
