"""The lab: scenarios, experiments, cards and reports.

scenario.py, faults.py, values.py, toml_file.py   a world as data; files with places for errors
build.py, launch.py     data -> live parts -> an engine (`launch.py` is the one seam)
card.py, card_text.py, discover.py   catalogue cards: declared, read as text, found
cell.py, run.py, experiment.py, jobs.py, store.py   one run; many; in processes; kept in SQLite
rows.py, statistics.py, judge.py     numbers, intervals, verdicts
report.py, report_data.py, text.py, page.py, page_style.py, plot.py, picture.py   what people read
replay.py, export.py, data_sets.py, environment.py   again; the model; data at hand; versions

Everything is synchronous and needs no event loop, so that it works inside a notebook's.
"""
