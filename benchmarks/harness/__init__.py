"""Code shared by the benchmarks: networks, recipes, held-out images, saved results and report files."""
