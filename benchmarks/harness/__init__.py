"""What the benchmarks share: networks and recipes, images, kept results and how they are written."""
