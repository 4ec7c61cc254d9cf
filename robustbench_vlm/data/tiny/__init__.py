"""A small world of rendered images with captions: what the demo runs on when nothing can be downloaded."""
