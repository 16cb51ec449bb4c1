"""Table 5 of Ef-QuantFace: ``python benchmarks/table5.py``; paper/table.py says what it does."""

from paper.table import command

main = command(5)

if __name__ == "__main__":
    main()
