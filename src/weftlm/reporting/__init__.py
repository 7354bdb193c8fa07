"""Run folders in, one self-contained HTML page out.

Takes metrics, summaries and recipes of finished or running runs, and routing traces; gives report.html and trace pages,
which need no network. Read `report.py` first, `inspect.py` for traces.
"""
