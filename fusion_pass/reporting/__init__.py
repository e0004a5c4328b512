"""What became of every site, as data and as text.

    report, records                     the data, and how planning fills it in
    recording, store                    collecting it around runs and traces; records on disk for warm starts
    summary, render, render_html        text, markdown, HTML
    progress, weightless                signs of life while a model is traced, and tracing without weights

The data is plain and readable as JSON; the texts are made of it alone.
"""
