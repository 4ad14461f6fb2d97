"""READ-mini's data: a small world of real photographs, written in the real formats (`python -m dataset.mini --out data/mini`)."""
