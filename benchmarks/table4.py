"""Table 4 of Ef-QuantFace: ``python benchmarks/table4.py``; paper_table.py says what it does."""

from paper_table import command

main = command(4)

if __name__ == "__main__":
    main()
