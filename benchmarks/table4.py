"""Table 4 of Ef-QuantFace: ``python benchmarks/table4.py``; paper/table.py says what it does."""

from paper.table import command

main = command(4)

if __name__ == "__main__":
    main()
