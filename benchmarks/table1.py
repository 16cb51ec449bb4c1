"""Table 1 of Ef-QuantFace: ``python benchmarks/table1.py``; paper_table.py says what it does."""

from paper_table import command

main = command(1)

if __name__ == "__main__":
    main()
