"""Table 1 of Ef-QuantFace: ``python benchmarks/table1.py``; paper/table.py says what it does."""

from paper.table import command

main = command(1)

if __name__ == "__main__":
    main()
