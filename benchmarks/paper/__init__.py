"""The tables of Ef-QuantFace: what it prints, and what its methods and ours give here."""
