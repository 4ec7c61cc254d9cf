"""Figures for papers, drawn by matplotlib from the rows of a leaderboard or the log of a training run."""
