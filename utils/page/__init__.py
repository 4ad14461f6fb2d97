"""The page of `app.py`: a picture is put in, questions are asked, and what the answers mean is shown in layers.

    session.py    what is kept: pictures with their conversations, a bounded number of them, for a bounded time
    desk.py       what is done: look, ask, stop, prompt again; every limit and every message
    markup.py     how it reads: fragments of HTML, every word in them escaped
    layout.py     where it stands: Gradio's components and events (the one file that imports Gradio, and only when it builds)
    gate.py       what is let in: an ASGI layer before Gradio that takes pictures and turns away all that the page does not use

No file is written and no path is read on behalf of a visitor: a picture comes as the bytes of a request, and pictures, masks and
downloads go back within the page.
"""
