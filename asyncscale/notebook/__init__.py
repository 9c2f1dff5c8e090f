"""What Jupyter shows of clients and completions, the live dashboard, and what happens when a cell is run again.

Imported when it is first needed; only the dashboard needs ipywidgets (``pip install 'asyncscale[notebook]'``).
"""
