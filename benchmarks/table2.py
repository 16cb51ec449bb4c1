"""Table 2 of Ef-QuantFace.

    python benchmarks/table2.py [--weights DIR] [--data DIR] [--recipe paper|qface] [--networks R18] [-o runs/table2]

benchmarks/paper_rows.py has the printed figures, benchmarks/paper_sources.py says which files are looked for. With the
paper's files all rows of the paper are run; beside them, or without them, its methods on the stand-ins, tuned on the
first half of LFW's people and judged on the second. Figures are kept in the output folder: the same command goes on
from there.
"""

from paper_table import command

main = command(2)

if __name__ == "__main__":
    main()
