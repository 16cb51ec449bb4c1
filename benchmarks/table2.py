"""Table 2 of Ef-QuantFace: ``python benchmarks/table2.py``; paper/table.py says what it does."""

from paper.table import command

main = command(2)

if __name__ == "__main__":
    main()
