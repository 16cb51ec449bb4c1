"""Table 3 of Ef-QuantFace: ``python benchmarks/table3.py``; paper/table.py says what it does."""

from paper.table import command

main = command(3)

if __name__ == "__main__":
    main()
