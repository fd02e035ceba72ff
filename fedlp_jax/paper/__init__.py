"""The result table of FedLP, reproduced.

published.py  the published numbers, and each cell as a configuration
costs.py      Comm. and Comp. of every row, counted and compared with the published
cells.py      a directory of cells: their status, an estimate of the rest, and running it
figures.py    accuracy against rounds and against uploads
results.py    finished cells -> table.md, table.csv, table.json, and tables for a terminal
"""
