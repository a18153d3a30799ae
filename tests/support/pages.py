"""HTML pages, parsed."""

from html.parser import HTMLParser

# Elements without an end tag.
VOID = {"meta", "img", "br", "line", "polyline"}


class Page(HTMLParser):
    """Elements and words of an HTML page; fails if tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.words = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
