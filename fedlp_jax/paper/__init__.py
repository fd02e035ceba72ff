"""The result table of FedLP, reproduced, and the theory of its masks.

published.py  the published numbers, and each cell as a configuration
costs.py      Comm. and Comp. of every row, counted and compared with the published
cells.py      a directory of cells: their status, an estimate of the rest, and running it
figures.py    accuracy against rounds and against uploads
results.py    finished cells -> table.md, table.csv, table.json, and tables for a terminal
theory/       what the masks do on average, and a bound on convergence; on the host
"""
