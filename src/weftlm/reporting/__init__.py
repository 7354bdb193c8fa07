"""Run folders, measurements and traces in, one self-contained HTML page out.

Takes metrics, summaries and recipes of finished or running runs, tables of models, a gate's certificate and routing
traces; gives report.html and trace pages, which need no network. Read `page.py` first, then `report.py`.
"""
