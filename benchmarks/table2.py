"""Table 2 of Ef-QuantFace: ``python benchmarks/table2.py``; paper_table.py says what it does."""

from paper_table import command

main = command(2)

if __name__ == "__main__":
    main()
