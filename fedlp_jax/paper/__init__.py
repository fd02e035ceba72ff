"""The result table of FedLP again: what it says, what it costs, and its cells, run one by one.

paper.py     the published table, and its cells as configurations
costs.py     Comm. and Comp. of every row, counted, beside what is published
forecast.py  time, upload and computation of cells before they are run
cells.py     a directory of cells: which are done, and running those that are not
table.py     finished cells -> table.md, table.csv, table.json, and back
figures.py   accuracy against rounds and against uploads
run.py       all of that for one directory
view.py      the same on a terminal
"""
