"""HTML read with the standard library: every tag closed in order, and the texts that a reader sees."""

from html.parser import HTMLParser

VOID = {"img", "br", "hr", "meta"}


class Page(HTMLParser):
    """A piece of HTML; a tag that is not closed, or closed out of order, fails.

    Attributes:
        texts: The texts outside of `<style>`.
        tags: The names of all tags.
        attributes: All attributes, as (tag, name, value).
    """

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.attributes, self.opened = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.opened, f"not closed: {self.opened}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened and self.opened.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.opened and data.strip():
            self.texts.append(data)

    @property
    def style(self):
        """The values of all style attributes."""
        return [value for _, name, value in self.attributes if name == "style"]
