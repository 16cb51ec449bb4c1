"""Tables of the Ef-QuantFace paper: printed figures, and measured ones of its methods and of qface."""
