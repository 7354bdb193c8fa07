"""Run folders in, one self-contained HTML page out.

Takes metrics, summaries and recipes of finished or running runs; gives report.html, which needs no network.
Read `report.py` first.
"""
